"""A sweep without a conductor: workers that find nothing to take bring it to its next stage themselves.

On a cluster nothing runs for as long as a sweep does. So whoever is idle conducts, one at a time, for the
seconds that it takes: what the finished trials allow is planned and queued, and at the end the report is
written. A worker that dies in the middle of it leaves that to the next one.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from lightning_modules.run_dir import write_text
from sweeps.conduct import Sweep
from sweeps.stores.locks import ProcessLock
from sweeps.stores.store import Store
from sweeps.stores.study_dir import load
from sweeps.supervise import Pending, states_of


class Advance:
    """One worker's view of how far its sweep is."""

    def __init__(self, store: Store, signals: list[int], say: Callable[[str], None]) -> None:
        self.store, self.signals, self.say = store, signals, say
        self._seen = ""  # states of all trials when this worker last conducted

    def is_over(self) -> bool:
        """Plan what has become possible; True once the last stage is finished and reported.

        Where nothing has changed since this worker last looked, or another process conducts, nothing happens.
        """
        states = self._states()
        if states == self._seen:
            return False
        lock = ProcessLock(self.store.study_dir / "locks" / "sweep.lock")
        if not lock.try_acquire():
            return False
        try:
            self._seen = states
            return self._is_reported(states) or self._conduct()
        finally:
            lock.release()

    def _conduct(self) -> bool:
        # Failed trials stay failed: trying them again is for somebody who has looked why.
        config = replace(load(self.store.study_dir), workers=0, retry_failed=False)
        try:
            Sweep(config, self.store.study_dir, Console(quiet=True), self.signals).run()
        except Pending as pending:
            self.say(str(pending))
            return False
        write_text(self._note, self._states())
        self.say("the sweep is finished and reported")
        return True

    def _is_reported(self, states: str) -> bool:
        """Whether another worker has reported just this: no need to write it all once more."""
        return self._note.is_file() and self._note.read_text() == states

    def _states(self) -> str:
        studies = self.store.load_studies()
        return "".join(f"{study.study_name} {states_of(study)}\n" for study in studies)

    @property
    def _note(self) -> Path:
        return self.store.study_dir / "finished"

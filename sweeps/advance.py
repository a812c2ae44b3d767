"""A sweep without a conductor: workers that find nothing to take bring it to its next stage themselves.

On a cluster nothing runs for as long as a sweep does. So whoever is idle conducts, one at a time, for the
seconds that it takes: what the finished trials allow is planned and queued, and at the end the report is
written. A worker that dies in the middle of it leaves that to the next one.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from optuna.study import Study
from rich.console import Console

from lightning_modules.run_dir import write_text
from sweeps.conduct import Sweep
from sweeps.locks import ProcessLock
from sweeps.studies import is_open, load_studies
from sweeps.study_dir import load
from sweeps.supervise import Pending, count_ended


class Advance:
    """One worker's view of how far its sweep is."""

    def __init__(self, study_dir: Path, signals: list[int], say: Callable[[str], None]) -> None:
        self.study_dir, self.signals, self.say = study_dir, signals, say
        self._seen = -1  # trials that had ended when this worker last conducted

    def is_over(self) -> bool:
        """Plan what has become possible; True once the last stage is finished and reported.

        Where nothing has ended since this worker last looked, or another process conducts, nothing happens.
        """
        studies = load_studies(self.study_dir)
        ended = sum(count_ended(study) for study in studies)
        if ended == self._seen:
            return False
        lock = ProcessLock(self.study_dir / "locks" / "sweep.lock")
        if not lock.try_acquire():
            return False
        try:
            self._seen = ended
            return self._reported(studies, ended) or self._conduct()
        finally:
            lock.release()

    def _conduct(self) -> bool:
        # Failed trials stay failed: trying them again is for somebody who has looked why.
        config = replace(load(self.study_dir), workers=0, retry_failed=False)
        try:
            Sweep(config, self.study_dir, Console(quiet=True), self.signals).run()
        except Pending as pending:
            self.say(str(pending))
            return False
        ended = sum(count_ended(study) for study in load_studies(self.study_dir))
        write_text(self._note, f"{ended}\n")
        self.say("the sweep is finished and reported")
        return True

    def _reported(self, studies: list[Study], ended: int) -> bool:
        """Whether another worker has reported just this: no need to write it all once more."""
        if any(is_open(study) for study in studies) or not self._note.is_file():
            return False
        return self._note.read_text() == f"{ended}\n"

    @property
    def _note(self) -> Path:
        return self.study_dir / "finished"

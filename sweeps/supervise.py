"""The workers of a running sweep: started, replaced when they die, stopped together."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from optuna.study import Study
from optuna.trial import TrialState

from sweeps.endings import STOPPED, TOO_MANY_FAILURES
from sweeps.planning.budget import is_open
from sweeps.stores.store import Store
from sweeps.trials.claims import to_take
from sweeps.trials.steps import STOP_GRACE_SECONDS, last_words
from sweeps.trials.tether import tethered


class SweepFailed(Exception):
    """The sweep cannot go on; the message says why and what to do."""


class Stopped(KeyboardInterrupt):
    """The sweep was asked to stop and has stopped its workers and their trials."""


class Pending(Exception):
    """workers=0: trials are left to workers elsewhere; the message counts them."""

    run_status = "SCHEDULED"  # what MLflow says of the stage meanwhile


class Workers:
    """Up to `config.workers` processes of sweeps.worker on one study directory.

    They die with this process (SIGTERM, so that trials save first), and trials die with them.
    """

    def __init__(self, store: Store, signals: list[int], say: Callable[[str], None]) -> None:
        """signals: fills with what this process receives; one asks for the end, a second hurries it."""
        self.store, self.signals, self.say = store, signals, say
        self.study_dir, self.config = store.study_dir, store.config
        self.since = time.time()
        self.crashes = 0
        self._slots: dict[int, subprocess.Popen] = {}

    def run(self, studies: list[Study], watch: Callable[[], None], grow: Callable[[], int]) -> None:
        """Keep workers at it until every trial of the studies has ended, calling `watch` twice a second.

        `grow` may queue further trials and returns how many: it is called first and whenever one has begun
        or ended.
        Raises Stopped after a signal, SweepFailed after too many failed trials or crashed workers.
        """
        seen: list[list[int]] = []  # states of the trials when `grow` was last called
        try:
            while True:
                # In this order: where none was open, all that have ended are seen.
                is_over = not any(is_open(study, self.config) for study in studies)
                states = [states_of(study) for study in studies]
                if states != seen:
                    if finished_of(states) > finished_of(seen):
                        self.crashes = 0  # they do get on
                    seen = states
                    is_over = not grow() and is_over
                if is_over:
                    break
                if self.config.workers == 0:
                    waiting = to_take(self.store, studies)
                    raise Pending(f"{studies[0].study_name}: {waiting} trials wait for workers")
                if self.signals:
                    self.say("Stopping: running trials save what they have (Ctrl-C again to kill them) ...")
                    raise Stopped
                self._collect()
                self._start_missing(studies)
                watch()
                time.sleep(0.5)
            watch()
        finally:
            self.stop()

    def stop(self) -> None:
        """Ask every worker to end and wait; one that hangs is killed, and the kernel kills its trial."""
        for process in self._slots.values():
            process.terminate()
        deadline = time.monotonic() + STOP_GRACE_SECONDS + 5
        while any(process.poll() is None for process in self._slots.values()):
            if time.monotonic() > deadline or len(self.signals) > 1:
                for process in self._slots.values():
                    process.kill()
            time.sleep(0.05)
        self._slots.clear()

    def log(self, index: int) -> Path:
        return self.study_dir / "workers" / f"worker-{index}.txt"

    def _collect(self) -> None:
        for index, process in list(self._slots.items()):
            status = process.poll()
            if status is None:
                continue
            del self._slots[index]
            if status == TOO_MANY_FAILURES:
                raise SweepFailed(
                    f"stopped after {self.config.max_failures} failed trials in a row (max_failures); "
                    "the log.txt of their run directories say more"
                )
            if status not in (0, STOPPED):
                self.crashes += 1
            if self.crashes > 2 * self.config.workers:
                raise SweepFailed(f"workers keep ending with status {status}: {last_words(self.log(index))}")

    def _start_missing(self, studies: list[Study]) -> None:
        """As many workers as there is work for; a trial whose worker died counts as work."""
        if len(self._slots) >= self.config.workers:
            return
        free = [index for index in range(self.config.workers) if index not in self._slots]
        for index in free[: to_take(self.store, studies)]:
            self._slots[index] = self._start(index)

    def _start(self, index: int) -> subprocess.Popen:
        arguments = [f"study={self.study_dir}", f"index={index}", f"since={self.since}"]
        command = [sys.executable, "-m", "sweeps.worker", *arguments]
        self.log(index).parent.mkdir(exist_ok=True)
        with self.log(index).open("a") as output:
            return subprocess.Popen(
                tethered(command, "SIGTERM"),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C reaches this process alone, which stops them
            )


def finished_of(states: list[list[int]]) -> int:
    """How many trials have ended."""
    return sum(TrialState(value).is_finished() for study in states for value in study)


def states_of(study: Study) -> list[int]:
    return [trial.state.value for trial in study.get_trials(deepcopy=False)]

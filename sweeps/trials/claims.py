"""Who runs what: a trial belongs to the process that holds its lock, and to nobody once that has died.

A trial WAITS, is RUNNING, and ends COMPLETE, PRUNED or FAIL. One whose worker was told to stop waits again,
under its number; one whose worker was killed stays RUNNING without a lock, and the next worker takes it over.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from conf.sweep_schema import SweepConfig
from conf.sweep_stages import Stage
from lightning_modules.job import holder
from sweeps.planning.budget import has_begun, is_spent
from sweeps.planning.samplers import make_sampler, suggest
from sweeps.stores.store import Lock, Store
from sweeps.stores.studies import trial_name
from sweeps.trials.identity import last_sign_of_life
from sweeps.trials.sharing import deferred


class LostTrial(Exception):
    """Another worker has the trial: this one was away from the database for too long."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A trial that this process runs; nobody else does while `lock` is held."""

    store: Store
    study: Study
    trial: Trial
    lock: Lock
    _beats: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.monotonic)  # a host's clock may be set meanwhile

    @property
    def stage(self) -> Stage:
        return self.study.user_attrs["stage"]

    @property
    def run_dir(self) -> Path:
        return self.store.run_dir(self.study, self.trial.number)

    @property
    def name(self) -> str:
        return trial_name(self.study, self.trial.number)

    def require_held(self) -> None:
        """Raises LostTrial if it has become somebody else's."""
        if not self.lock.keep(wait=True):
            raise LostTrial(f"{self.name}: another worker has taken it over")

    def beat(self, every: float) -> None:
        """Every so many seconds: make sure that the lock is still ours.

        A database that does not answer takes nothing away yet. Raises LostTrial.
        """
        if time.monotonic() - self._beats.get("last", 0.0) < every:
            return
        self._beats["last"] = time.monotonic()
        if not self.lock.keep(wait=False):
            raise LostTrial(f"{self.name}: another worker has taken it over")


def claim(store: Store, studies: list[Study]) -> Claim | None:
    """Take over a trial whose worker died, else the first that waits; None when nothing is left to take.

    One process at a time decides, under the sweep's claim lock; the trial's own lock then says that it is
    being worked on.
    """
    with store.holding("claim"):
        for study in studies:
            taken = _take_over(store, study) or _take_waiting(store, study)
            if taken is None:
                continue
            try:
                begin(taken)
            except BaseException:
                taken.lock.release()
                raise
            return taken
    return None


def begin(taken: Claim, *, by_worker: bool = True) -> None:
    """Note who has the trial from now on, and let its point be chosen."""
    trial, now = taken.trial, holder()
    trial.set_user_attr("worked", trial.user_attrs.get("worked", 0.0) + _unrecorded(taken))
    trial.set_user_attr("claimed", now["since"])
    if by_worker:
        trial.set_user_attr("holders", [*trial.user_attrs.get("holders", []), now])
    suggest(trial, taken.store.config)


def to_take(store: Store, studies: list[Study]) -> int:
    """How many trials a new worker could take: those that wait and those whose worker died."""
    count = 0
    with store.holding("claim"):
        for study in studies:
            count += len(_waiting(study, store.config))
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                lock = store.trial_lock(study, trial.number)
                if lock.try_acquire():
                    lock.release()
                    count += 1
    return count


def finish(
    taken: Claim,
    values: Mapping[str, float],
    seconds: float,
    known: Mapping[str, Any] | None = None,
    excesses: Mapping[str, float] | None = None,
) -> None:
    """Record the trial's values by objective. Raises LostTrial.

    known: further attributes. excesses: by how much each bound is broken; at most 0 where it holds.
    """
    taken.require_held()
    for name, excess in (excesses or {}).items():
        if name not in taken.trial.constraints:  # by a worker that died before it told the values
            taken.trial.set_constraint(name, excess)
    _note_end(taken, {"seconds": seconds, **(known or {})})
    taken.study.tell(taken.trial, list(values.values()))


def prune(taken: Claim, seconds: float, known: Mapping[str, Any] | None = None) -> None:
    taken.require_held()
    _note_end(taken, {"seconds": seconds, **(known or {})})
    taken.study.tell(taken.trial, state=TrialState.PRUNED)


def fail(taken: Claim, why: str) -> None:
    taken.require_held()
    _note_end(taken, {"error": why})
    taken.study.tell(taken.trial, state=TrialState.FAIL)


def put_back(taken: Claim) -> None:
    """Let the trial wait again, to be continued under its number: preempted is not failed."""
    _note_end(taken, {})
    taken.study._storage.set_trial_state_values(taken.trial._trial_id, TrialState.WAITING)


def _note_end(taken: Claim, known: Mapping[str, Any]) -> None:
    attributes = taken.trial.user_attrs
    worked = attributes["worked"] + time.monotonic() - taken._since
    # `claimed` last: nothing is under way from then on.
    for name, value in {**known, "worked": worked, "claimed": None}.items():
        taken.trial.set_user_attr(name, value)


def _unrecorded(taken: Claim) -> float:
    """Seconds that a killed worker has put into the trial, by the files it wrote last."""
    claimed = taken.trial.user_attrs.get("claimed")
    if claimed is None:
        return 0.0
    return max(0.0, min(time.time(), last_sign_of_life(taken.run_dir)) - claimed)


def _take_over(store: Store, study: Study) -> Claim | None:
    for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        lock = store.trial_lock(study, frozen.number)
        if not lock.try_acquire():
            continue
        # Its worker may have told the result between our reading the list and its letting the lock go.
        if study.get_trials(deepcopy=False)[frozen.number].state == TrialState.RUNNING:
            study.sampler = make_sampler(study, store.config, frozen.user_attrs["plan"])
            return Claim(store=store, study=study, trial=Trial(study, frozen._trial_id), lock=lock)
        lock.release()
    return None


def _take_waiting(store: Store, study: Study) -> Claim | None:
    for frozen in _waiting(study, store.config):
        lock = store.trial_lock(study, frozen.number)
        if not lock.try_acquire():
            continue  # its last worker is about to let it go
        if study._storage.set_trial_state_values(frozen._trial_id, TrialState.RUNNING):
            study.sampler = make_sampler(study, store.config, frozen.user_attrs["plan"])
            return Claim(store=store, study=study, trial=Trial(study, frozen._trial_id), lock=lock)
        lock.release()
    return None


def _waiting(study: Study, config: SweepConfig) -> list[FrozenTrial]:
    """Waiting trials that may be taken: those the budget allows, less those that wait for another's work."""
    trials = study.get_trials(deepcopy=False)
    waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
    if waiting and is_spent(study, config):
        waiting = [trial for trial in waiting if has_begun(trial)]
    later = deferred(waiting, trials, study, config)
    return [trial for trial in waiting if trial.number not in later]

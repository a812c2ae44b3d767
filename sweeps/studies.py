"""The Optuna studies of a sweep: one journal file in the study directory, one study per stage and model.

Every planned trial is put in the queue when its study is made, so the budget is exact whatever the number of
workers: a worker only ever takes what waits. `claim` also takes over what a dead worker left RUNNING.
"""

import json
import random
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from conf.search_space import Point, Range, Space
from conf.sweep_schema import Direction, Stage, SweepConfig, mitigation_spaces, train_space
from sweeps.locks import JournalLock, ProcessLock, holding

optuna.logging.set_verbosity(optuna.logging.ERROR)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A trial that this process runs; nobody else does while `lock` is held."""

    study: Study
    trial: Trial
    run_dir: Path
    lock: ProcessLock

    @property
    def stage(self) -> Stage:
        return self.study.user_attrs["stage"]

    @property
    def name(self) -> str:
        return f"{self.study.study_name}/{self.run_dir.name}"


def open_journal(study_dir: Path) -> JournalStorage:
    path = study_dir.resolve() / "journal.log"
    return JournalStorage(JournalFileBackend(str(path), JournalLock(path)))


def load_studies(study_dir: Path, storage: JournalStorage | None = None) -> list[Study]:
    """All studies in the order of their making; none where there is no journal yet."""
    if not (study_dir / "journal.log").exists():
        return []
    storage = storage or open_journal(study_dir)
    names = optuna.get_all_study_names(storage)
    return [optuna.load_study(study_name=name, storage=storage) for name in names]


def make_study(storage: JournalStorage, name: str, direction: Direction, **attributes: Any) -> Study:
    """Create the study, or find the one that is there; `attributes` say what its trials are."""
    study = optuna.create_study(study_name=name, storage=storage, direction=direction, load_if_exists=True)
    known = study.user_attrs
    for key, value in attributes.items():
        if key not in known or known[key] != value:
            study.set_user_attr(key, value)
    return study


def run_directory(study_dir: Path, study: Study, number: int) -> Path:
    return study_dir / study.study_name / f"trial-{number:04d}"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One planned trial: the parameters that are fixed (the sampler sets the others) and what it carries."""

    fixed: Point
    attributes: dict[str, Any]


Plan = dict[str, Planned]


def plan_points(points: Iterable[Point], seeds: Iterable[int | None]) -> Plan:
    """Every point with every seed; None where nothing takes a seed."""
    plan = {}
    for seed in seeds:
        for point in points:
            plan[json.dumps(point | {"seed": seed})] = Planned(fixed=point, attributes={"seed": seed})
    return plan


def plan_samples(count: int, seeds: Sequence[int | None]) -> Plan:
    """`count` trials whose points the sampler chooses when they start; the seeds take turns."""
    turns = [seeds[i % len(seeds)] for i in range(count)]
    return {f"sample-{i}": Planned(fixed={}, attributes={"seed": seed}) for i, seed in enumerate(turns)}


def plan_mitigations(names: Iterable[str], count: int) -> Plan:
    """`count` trials of every mitigation, taking turns; the sampler chooses their settings."""
    return {
        f"{name}-{i}": Planned(fixed={"mitigation.name": name}, attributes={"seed": None})
        for i in range(count)
        for name in names
    }


def plan_given(points: Iterable[Point], seeds: Iterable[int | None]) -> Plan:
    """Points that no sampler touches, in or outside the space: the baseline, what a confirmation compares,
    what a search asks for next."""
    return {
        json.dumps(point | {"seed": seed}): Planned(fixed={}, attributes={"point": point, "seed": seed})
        for seed in seeds
        for point in points
    }


def enqueue(study: Study, plan: Plan) -> int:
    """Queue what of the plan the study lacks, by its keys; returns how many trials these are."""
    known = {trial.user_attrs["plan"] for trial in study.get_trials(deepcopy=False)}
    missing = [key for key in plan if key not in known]
    for key in missing:
        _enqueue(study, plan[key].fixed, plan[key].attributes | {"plan": key})
    return len(missing)


def retry_failed(study: Study) -> int:
    """Queue once more, at the same point, what has only failed; returns how many trials these are."""
    latest = {trial.user_attrs["plan"]: trial for trial in study.get_trials(deepcopy=False)}
    failed = [trial for trial in latest.values() if trial.state == TrialState.FAIL]
    for trial in failed:
        kept = {name: trial.user_attrs[name] for name in trial.user_attrs["planned"]}
        fixed = {} if "point" in kept else point_of(trial)
        _enqueue(study, fixed, kept, retry_of=trial.number)
    return len(failed)


def _enqueue(study: Study, fixed: Point, planned: dict[str, Any], **further: Any) -> None:
    attributes = planned | {"planned": list(planned), "fixed": fixed} | further
    study.enqueue_trial(_to_parameters(fixed), user_attrs=attributes)


def is_open(study: Study) -> bool:
    """True while a trial waits or is marked as running."""
    return bool(study.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING)))


def claim(study_dir: Path, studies: list[Study], config: SweepConfig, worker: int) -> Claim | None:
    """Take over a trial whose worker died, else the first that waits; None when nothing is left to take.

    One process at a time decides, under the study directory's claim lock; the trial's own lock then says that
    it is being worked on.
    """
    with holding(study_dir / "locks" / "claim.lock"):
        for study in studies:
            taken = _take_over(study_dir, study) or _take_waiting(study_dir, study, config, worker)
            if taken:
                taken.trial.set_user_attr("claimed", time.time())
                suggest(taken.trial, config)
                return taken
    return None


def to_take(study_dir: Path, studies: list[Study]) -> int:
    """How many trials a new worker could take: those that wait and those whose worker died."""
    count = 0
    with holding(study_dir / "locks" / "claim.lock"):
        for study in studies:
            for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING)):
                lock = _trial_lock(study_dir, study, trial.number)
                if trial.state == TrialState.WAITING:
                    count += 1
                elif lock.try_acquire():
                    lock.release()
                    count += 1
    return count


def finish(taken: Claim, value: float, seconds: float, mlflow_run_id: str | None) -> None:
    """Record the trial's value; its lock still says that nobody else may."""
    taken.trial.set_user_attr("seconds", seconds)
    taken.trial.set_user_attr("mlflow_run_id", mlflow_run_id)
    taken.study.tell(taken.trial, value)


def fail(taken: Claim, why: str) -> None:
    taken.trial.set_user_attr("error", why)
    taken.study.tell(taken.trial, state=TrialState.FAIL)


def last_failures(studies: list[Study], since: float) -> int:
    """How many trials have failed in a row, of those that ended after `since`, whichever worker ran them."""
    ended = [
        (trial.datetime_complete, trial.state)
        for study in studies
        for trial in study.get_trials(deepcopy=False)
        if trial.datetime_complete is not None and trial.datetime_complete.timestamp() >= since
    ]
    count = 0
    for _, state in sorted(ended, key=lambda end: end[0], reverse=True):
        if state != TrialState.FAIL:
            break
        count += 1
    return count


def suggest(trial: Trial, config: SweepConfig) -> None:
    """Let the sampler set every parameter of the trial that is not set yet."""
    if "point" in trial.user_attrs:
        return
    if trial.study.user_attrs["stage"] == "train":
        _suggest_space(trial, train_space(config))
    else:
        spaces = mitigation_spaces(config)
        name = trial.suggest_categorical("mitigation.name", list(spaces))
        _suggest_space(trial, {_parameter(name, key): values for key, values in spaces[name].items()})


def point_of(trial: FrozenTrial | Trial) -> Point:
    """What the trial sets, by dotted name; of a trial that has not started, what is known of it."""
    return trial.user_attrs.get("point") or {**trial.user_attrs["fixed"], **_from_parameters(trial.params)}


def _parameter(mitigation: str, key: str) -> str:
    """What Optuna calls a setting. Two mitigations may share one, `every`, with other values each."""
    return key.replace("mitigation.", f"mitigation.{mitigation}.")


def _to_parameters(point: Point) -> Point:
    name = point.get("mitigation.name")
    return {
        key if key == "mitigation.name" or name is None else _parameter(name, key): point[key]
        for key in point
    }


def _from_parameters(parameters: Point) -> Point:
    name = parameters.get("mitigation.name")
    return {key.replace(f"mitigation.{name}.", "mitigation."): value for key, value in parameters.items()}


def _take_over(study_dir: Path, study: Study) -> Claim | None:
    for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        lock = _trial_lock(study_dir, study, frozen.number)
        if not lock.try_acquire():
            continue
        # Its worker may have told the result between our reading the list and its letting the lock go.
        if study.get_trials(deepcopy=False)[frozen.number].state == TrialState.RUNNING:
            run_dir = run_directory(study_dir, study, frozen.number)
            return Claim(study=study, trial=Trial(study, frozen._trial_id), run_dir=run_dir, lock=lock)
        lock.release()
    return None


def _take_waiting(study_dir: Path, study: Study, config: SweepConfig, worker: int) -> Claim | None:
    trials = study.get_trials(deepcopy=False)
    waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
    if not waiting:
        return None
    study.sampler = _make_sampler(study, config, seed=[config.seed, worker, len(trials) - len(waiting)])
    trial = study.ask()
    lock = _trial_lock(study_dir, study, trial.number)
    held = lock.try_acquire()
    assert held, f"{lock.path}: held by another process although the trial was waiting"
    return Claim(study=study, trial=trial, run_dir=run_directory(study_dir, study, trial.number), lock=lock)


def _trial_lock(study_dir: Path, study: Study, number: int) -> ProcessLock:
    return ProcessLock(study_dir / "locks" / f"{study.study_name}-{number:04d}.lock")


def _make_sampler(study: Study, config: SweepConfig, seed: list[int]) -> BaseSampler:
    """A fresh sampler per trial: workers that share a seed, or one started again, would repeat themselves."""
    number = random.Random(repr(seed)).getrandbits(32)
    startup = max(4, 2 * config.workers)
    if study.user_attrs["stage"] == "train":
        tpe = TPESampler(seed=number, n_startup_trials=startup)
        return tpe if config.train.sampler == "tpe" else RandomSampler(seed=number)
    if config.mitigation.sampler == "tpe":
        # Settings of one mitigation are tuned together, those of others apart; each begins at random.
        startup *= len(config.mitigation.space)
        with warnings.catch_warnings():  # `group` is marked as experimental since Optuna 2.8
            warnings.simplefilter("ignore", ExperimentalWarning)
            return TPESampler(seed=number, n_startup_trials=startup, multivariate=True, group=True)
    return RandomSampler(seed=number)


def _suggest_space(trial: Trial, space: Space) -> None:
    for name, values in space.items():
        if not isinstance(values, Range):
            trial.suggest_categorical(name, values)
        elif values.integer:
            trial.suggest_int(name, int(values.low), int(values.high), log=values.log)
        else:
            trial.suggest_float(name, values.low, values.high, log=values.log)

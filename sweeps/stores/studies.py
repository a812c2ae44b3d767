"""The Optuna studies of a sweep, one per stage and model, and the queues of their planned trials.

Every planned trial is put in the queue, so the budget is exact whatever the number of workers: a worker only
ever takes what waits (sweeps.trials.claims).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from conf.objectives import Direction
from conf.search_space import Point
from sweeps.planning.plans import Plan
from sweeps.planning.samplers import point_of, to_parameters
from sweeps.stores.store import Store, stage_name
from sweeps.stores.study_dir import load

LOST = "lost"  # attribute of a study: numbers of the ended trials whose results are gone (sweeps.reconcile)


def open_store(study_dir: Path, *, repair: bool = False) -> Store:
    """The store of an existing sweep. Raises ValueError (one line) where there is none, or it is damaged and
    not to be repaired."""
    return Store(study_dir, load(study_dir), repair=repair)


def load_studies(study_dir: Path) -> list[Study]:
    """All studies in the order of their making; none where there is nothing yet."""
    return open_store(study_dir).load_studies()


def make_study(store: Store, name: str, directions: Mapping[str, Direction], **attributes: Any) -> Study:
    """Create the study, or find the one that is there; `attributes` say what its trials are, `stage` last: a
    study without it is not made yet.

    directions: each metric with maximize or minimize.
    """
    study = store.make_study(name, list(directions.values()))
    known = study.user_attrs
    last = {"stage": attributes.pop("stage")} if "stage" in attributes else {}
    for key, value in {"objectives": list(directions), **attributes, **last}.items():
        if key not in known or known[key] != value:
            study.set_user_attr(key, value)
    return study


def trials_of(study: Study, *states: TrialState) -> list[FrozenTrial]:
    """The study's trials in the order of their numbers, without those whose results are lost."""
    trials = study.get_trials(deepcopy=False, states=states or None)
    gone = lost(study)
    return [trial for trial in trials if trial.number not in gone]


def lost(study: Study) -> set[int]:
    """Numbers of ended trials whose results are gone: others stand for them."""
    return set(study.user_attrs.get(LOST, []))


def mark_lost(study: Study, number: int) -> None:
    study.set_user_attr(LOST, sorted(lost(study) | {number}))


def latest(study: Study) -> dict[str, FrozenTrial]:
    """Of every planned trial the last attempt."""
    return {trial.user_attrs["plan"]: trial for trial in study.get_trials(deepcopy=False)}


def enqueue(study: Study, plan: Plan) -> int:
    """Queue what of the plan the study lacks, by its keys; returns how many trials these are."""
    known = latest(study)
    missing = [key for key in plan if key not in known]
    for key in missing:
        _enqueue(study, plan[key].fixed, plan[key].attributes | {"plan": key})
    return len(missing)


def retry_failed(study: Study) -> int:
    """Queue once more, at the same point, what has only failed; returns how many trials these are."""
    failed = [trial for trial in latest(study).values() if trial.state == TrialState.FAIL]
    for trial in failed:
        retry(study, trial)
    return len(failed)


def retry(study: Study, trial: FrozenTrial) -> None:
    """Queue the trial once more, at the same point."""
    kept = {name: trial.user_attrs[name] for name in trial.user_attrs["planned"]}
    fixed = {} if "point" in kept else point_of(trial)
    _enqueue(study, fixed, kept, retry_of=trial.number)


def enqueue_again(study: Study, key: str, planned: dict[str, Any], fixed: Point) -> FrozenTrial:
    """Queue a planned trial that the study has forgotten."""
    _enqueue(study, fixed, planned | {"plan": key})
    return latest(study)[key]


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


def trial_name(study: Study, number: int) -> str:
    return f"{stage_name(study)}/trial-{number:04d}"


def _enqueue(study: Study, fixed: Point, planned: dict[str, Any], **further: Any) -> None:
    attributes = planned | {"planned": list(planned), "fixed": fixed} | further
    parameters = to_parameters(fixed, study.user_attrs.get("powers", []))
    study.enqueue_trial(parameters, user_attrs=attributes)

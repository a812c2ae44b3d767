"""Run directories that belong to no trial, or to another one: moved to the trial that planned them.

A journal that was cut short forgets trials, and the next start queues them anew under other numbers. What
has been trained is not lost: trial.json says which planned trial a directory holds, at which point.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from lightning_modules.run_dir import read_result
from sweeps.stores.store import Store, stage_name
from sweeps.stores.studies import enqueue_again, lost, trial_name
from sweeps.trials.identity import read_identity, write_identity

MOVING = "moving-"
FIXED = "fixed_params"  # Optuna's name for the parameters of a queued trial


@dataclass(frozen=True, kw_only=True)
class _Astray:
    """A directory that is not where its identity says; identity None: it says nothing."""

    path: Path
    identity: dict[str, Any] | None


def mend_directories(store: Store, study: Study) -> list[str]:
    """Put every run directory where its trial is; returns a line for each repair."""
    lines = []
    with store.holding("claim"):
        for path in _directories(store, study):
            lines += _drop_damaged_results(store, study, path)
        astray = _astray(store, study)
        lines += [_place(store, study, one) for one in _set_aside(astray)]
    return lines


def _astray(store: Store, study: Study) -> list[_Astray]:
    trials = study.get_trials(deepcopy=False)
    found = []
    for path in _directories(store, study):
        identity = read_identity(path)
        number = _number(path)
        if number is not None and number < len(trials):
            trial = trials[number]
            if identity is None or identity["plan"] == trial.user_attrs["plan"]:
                continue
            if trial.state == TrialState.RUNNING and not _is_free(store, study, number):
                continue
        found.append(_Astray(path=path, identity=identity))
    return found


def _set_aside(astray: list[_Astray]) -> list[_Astray]:
    """Two directories may have to change places: all leave before any arrives."""
    aside = []
    for one in astray:
        if one.path.name.startswith(MOVING):
            aside.append(one)
            continue
        path = one.path.with_name(MOVING + one.path.name)
        while path.exists():
            path = path.with_name(path.name + "+")
        one.path.rename(path)
        aside.append(_Astray(path=path, identity=one.identity))
    return aside


def _place(store: Store, study: Study, one: _Astray) -> str:
    was = f"{stage_name(study)}/{one.path.name.removeprefix(MOVING).rstrip('+')}"
    if one.identity is None and not any(path.is_file() for path in one.path.rglob("*")):
        shutil.rmtree(one.path)
        return f"{was}: an empty directory of no trial; removed"
    trial = _home(store, study, one.identity) if one.identity is not None else None
    if trial is None:
        target = store.study_dir / "orphans" / was.replace("/", "-")
        while target.exists():
            target = target.with_name(target.name + "+")
        target.parent.mkdir(exist_ok=True)
        one.path.rename(target)
        why = "says nothing of its trial" if one.identity is None else "its trial has results elsewhere"
        return f"{was}: {why}; moved to orphans/{target.name}"
    assert one.identity is not None
    if one.identity["parameters"] and not trial.params:
        study._storage.set_trial_system_attr(trial._trial_id, FIXED, one.identity["parameters"])
    one.path.rename(store.run_dir(study, trial.number))
    name = trial_name(study, trial.number)
    write_identity(store.run_dir(study, trial.number), one.identity | {"trial": name, "number": trial.number})
    return f"{was}: has the work of {name}; moved there"


def _home(store: Store, study: Study, identity: dict[str, Any]) -> FrozenTrial | None:
    """The trial whose work a directory holds: one that waits for it, else one queued for it now."""
    trials = [t for t in study.get_trials(deepcopy=False) if t.user_attrs["plan"] == identity["plan"]]
    for trial in trials:
        free = trial.state == TrialState.WAITING or (
            trial.state == TrialState.RUNNING and _is_free(store, study, trial.number)
        )
        same = not trial.params or trial.params == identity["parameters"]
        if free and same and not store.run_dir(study, trial.number).exists():
            return trial
    if any(t.state != TrialState.FAIL and t.number not in lost(study) for t in trials):
        return None
    trial = enqueue_again(study, identity["plan"], identity["planned"], identity["fixed"])
    return None if store.run_dir(study, trial.number).exists() else trial


def _drop_damaged_results(store: Store, study: Study, path: Path) -> list[str]:
    lines = []
    for folder in (path, path / "evaluation"):
        try:
            read_result(folder)
        except ValueError:
            (folder / "result.json").rename(folder / "result.json.damaged")
            name = folder.relative_to(store.study_dir)
            lines.append(f"{name}: result.json cannot be read; set aside as result.json.damaged")
    return lines


def _directories(store: Store, study: Study) -> list[Path]:
    folder = store.study_dir / stage_name(study)
    paths = [*folder.glob("trial-*"), *folder.glob(f"{MOVING}*")]
    return sorted(path for path in paths if path.is_dir())


def _number(path: Path) -> int | None:
    digits = path.name.removeprefix("trial-")
    return int(digits) if digits.isdecimal() else None


def _is_free(store: Store, study: Study, number: int) -> bool:
    with try_locked(store, study, number) as held:
        return held


@contextmanager
def try_locked(store: Store, study: Study, number: int) -> Iterator[bool]:
    """The block runs with the trial's lock where nobody else has it; yields whether it does."""
    lock = store.trial_lock(study, number)
    held = lock.try_acquire()
    with ExitStack() as stack:
        if held:
            stack.callback(lock.release)
        yield held

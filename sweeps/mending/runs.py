"""MLflow runs whose status or names do not agree with what they stand for."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from lightning_modules.job import JOBS_TAG, jobs_of
from lightning_modules.mlflow_store import open_store
from lightning_modules.run_dir import read_result
from sweeps.mending.directories import try_locked
from sweeps.mending.lost_runs import find_run, remake_run, remake_stage
from sweeps.planning.budget import is_open
from sweeps.stores.store import Store, stage_name
from sweeps.stores.studies import trial_name
from sweeps.trials.steps import ended

if TYPE_CHECKING:
    from mlflow.tracking.client import MlflowClient

PARENT_TAG = "mlflow.parentRunId"


def mend_runs(store: Store, *, holds_sweep_lock: bool) -> list[str]:
    """Set the status and tags of every run of the sweep that nobody works on; a line for each repair."""
    client, experiment = open_store(store.config.tracking)
    runs = {run.info.run_id: run for run in _runs_of(client, experiment, store.config.name)}
    lines, ours = _find_stages(store, client, experiment, runs, holds_sweep_lock), set()
    for study in store.load_studies():
        for trial in study.get_trials(deepcopy=False):
            run_dir = store.run_dir(study, trial.number)
            parent = study.user_attrs["mlflow_run_id"]
            with try_locked(store, study, trial.number) as held:
                for folder in (run_dir, run_dir / "evaluation"):
                    tags = _tags(study, trial, folder, parent)
                    run = runs.get(_run_id(folder) or "")
                    if run is None and held:
                        run, said = _find_lost(store, client, experiment, trial, folder, tags)
                        lines += said
                    if run is not None:
                        ours.add(run.info.run_id)
                        parent = run.info.run_id
                        lines += _mend(client, run, _status(folder, trial.state), tags) if held else []
    if not holds_sweep_lock:
        lines += _mend_stages(store, client, runs, ours)
    return lines + _mend_superseded(store, client, runs, ours)


def _find_stages(
    store: Store, client: "MlflowClient", experiment: str, runs: dict[str, Any], holds_sweep_lock: bool
) -> list[str]:
    """The runs above a stage's trials, where the store has lost them and no sweep is at work."""
    lock, lines = store.lock("sweep"), []
    if not holds_sweep_lock and not lock.try_acquire():
        return []
    try:
        for name, members in _stages(store).items():
            run_id = _run_id(store.study_dir / name)
            if run_id is None or run_id in runs:
                continue
            run, said = find_run(client, run_id)
            if run is None:
                run, said = remake_stage(store, client, experiment, name, _stage_status(store, members))
            if run is not None:
                runs[run.info.run_id] = run
            lines += said
    finally:
        if not holds_sweep_lock:
            lock.release()
    return lines


def _stages(store: Store) -> dict[str, list[Study]]:
    """Run directory of each MLflow run above trials -> its studies."""
    stages: dict[str, list[Study]] = {}
    for study in store.load_studies():
        stages.setdefault(stage_name(study).replace("confirm-", "mitigation-"), []).append(study)
    return stages


def _stage_status(store: Store, members: list[Study]) -> str:
    return "KILLED" if any(is_open(study, store.config) for study in members) else "FINISHED"


def _mend(client: "MlflowClient", run: Any, status: str, tags: dict[str, str]) -> list[str]:
    lines, name = [], f"MLflow run {run.info.run_id} ({tags.get('trial', run.info.run_name)})"
    if run.info.status != status:
        client.set_terminated(run.info.run_id, status)
        lines.append(f"{name}: was {run.info.status}; set to {status}")
    wrong = {key: value for key, value in tags.items() if run.data.tags.get(key) != value}
    for key, value in wrong.items():
        client.set_tag(run.info.run_id, key, value)
    if wrong:
        lines.append(f"{name}: set {', '.join(wrong)}")
    return lines


def _mend_stages(store: Store, client: "MlflowClient", runs: dict[str, Any], ours: set[str]) -> list[str]:
    """The runs above a stage's trials, unless a sweep is at work."""
    lock = store.lock("sweep")
    if not lock.try_acquire():
        ours |= {run_id for run_id, run in runs.items() if PARENT_TAG not in run.data.tags}
        return []
    lines = []
    try:
        for name, members in _stages(store).items():
            run = runs.get(_run_id(store.study_dir / name) or "")
            if run is None:
                continue
            ours.add(run.info.run_id)
            status = _stage_status(store, members)
            if run.info.status == "RUNNING" or (run.info.status == "FINISHED" and status == "KILLED"):
                lines += _mend(client, run, status, {})
    finally:
        lock.release()
    return lines


def _mend_superseded(store: Store, client: "MlflowClient", runs: dict[str, Any], ours: set[str]) -> list[str]:
    """Runs still RUNNING in the name of a directory of this study that has another run now."""
    here, lines = store.study_dir.resolve(), []
    for run_id, run in runs.items():
        path = Path(run.data.tags.get("run_dir", "/")).resolve()
        noted = _run_id(path)
        is_left = run_id not in ours and path.is_relative_to(here) and noted != run_id
        if is_left and run.info.status == "RUNNING" and PARENT_TAG in run.data.tags:
            lines += _mend(client, run, "KILLED", {"superseded": "true"})
    return lines


def _status(folder: Path, state: TrialState) -> str:
    result = read_result(folder)
    if result is not None:
        return "KILLED" if result["status"] == "pruned" else "FINISHED"
    return "FAILED" if state == TrialState.FAIL else "KILLED"


def _tags(study: Study, trial: FrozenTrial, folder: Path, parent: str | None) -> dict[str, str]:
    tags = {"trial": trial_name(study, trial.number), "trial_number": str(trial.number)}
    tags["run_dir"] = str(folder.absolute())
    jobs = jobs_of(trial.user_attrs.get("holders", []))
    return tags | ({JOBS_TAG: jobs} if jobs else {}) | ({PARENT_TAG: parent} if parent else {})


def _find_lost(
    store: Store,
    client: "MlflowClient",
    experiment: str,
    trial: FrozenTrial,
    folder: Path,
    tags: dict[str, str],
) -> tuple[Any, list[str]]:
    """The run of a directory that has one on record. Where work is left, whoever does it makes the next."""
    run_id = _run_id(folder)
    if run_id is None:
        return None, []
    run, said = find_run(client, run_id)
    if run is None and trial.state.is_finished() and ended(folder):
        status = _status(folder, trial.state)
        return remake_run(client, experiment, store.config, folder, status, tags)
    return run, said


def _run_id(folder: Path) -> str | None:
    try:
        return json.loads((folder / "tracking.json").read_text())["run_id"]
    except (OSError, json.JSONDecodeError):
        return None


def _runs_of(client: "MlflowClient", experiment: str, sweep: str) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_runs([experiment], f"tags.sweep = '{sweep}'", page_token=token)
        yield from page
        token = page.token
        if not token:
            return

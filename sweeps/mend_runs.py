"""MLflow runs whose status or names do not agree with what they stand for."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from lightning_modules.job import JOBS_TAG, jobs_of
from lightning_modules.mlflow_store import open_store
from lightning_modules.run_dir import read_result
from sweeps.budget import is_open
from sweeps.mend_directories import try_locked
from sweeps.store import Store, stage_name
from sweeps.studies import trial_name

if TYPE_CHECKING:
    from mlflow.tracking.client import MlflowClient

PARENT_TAG = "mlflow.parentRunId"


def mend_runs(store: Store, *, holds_sweep_lock: bool) -> list[str]:
    """Set the status and tags of every run of the sweep that nobody works on; a line for each repair."""
    client, experiment = open_store(store.config.tracking)
    runs = {run.info.run_id: run for run in _runs_of(client, experiment, store.config.name)}
    lines, ours = [], set()
    for study in store.load_studies():
        for trial in study.get_trials(deepcopy=False):
            run_dir = store.run_dir(study, trial.number)
            with try_locked(store, study, trial.number) as held:
                for folder, parent in ((run_dir, study.user_attrs["mlflow_run_id"]), *_evaluation(run_dir)):
                    run = runs.get(_run_id(folder) or "")
                    if run is None:
                        continue
                    ours.add(run.info.run_id)
                    if held:
                        tags = {"trial": trial_name(study, trial.number), "trial_number": str(trial.number)}
                        tags["run_dir"] = str(folder.absolute())
                        jobs = jobs_of(trial.user_attrs.get("holders", []))
                        tags |= ({JOBS_TAG: jobs} if jobs else {}) | ({PARENT_TAG: parent} if parent else {})
                        lines += _mend(client, run, _status(folder, trial.state), tags)
    if not holds_sweep_lock:
        lines += _mend_stages(store, client, runs, ours)
    return lines + _mend_superseded(store, client, runs, ours)


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
        studies = store.load_studies()
        for name in dict.fromkeys(stage_name(study).replace("confirm-", "mitigation-") for study in studies):
            run = runs.get(_run_id(store.study_dir / name) or "")
            if run is None:
                continue
            ours.add(run.info.run_id)
            names = (name, name.replace("mitigation-", "confirm-"))
            members = [study for study in studies if stage_name(study) in names]
            unfinished = any(is_open(study, store.config) for study in members)
            if run.info.status == "RUNNING" or (run.info.status == "FINISHED" and unfinished):
                lines += _mend(client, run, "KILLED" if unfinished else "FINISHED", {})
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


def _evaluation(run_dir: Path) -> list[tuple[Path, str | None]]:
    folder = run_dir / "evaluation"
    return [(folder, _run_id(run_dir))] if folder.is_dir() else []


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

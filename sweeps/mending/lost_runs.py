"""MLflow runs that the store has lost: brought back from its trash, else made anew from their directories.

A run directory holds what its run held: config.yaml (params, tags), metrics.jsonl (every point with its
time), result.json, evaluation.json and figures. Made anew, a run has another id; its tag `replaces` names the
old one, which checkpoints and the trial's own record still know. What only the lost run knew is not made up:
host, commit and versions of the processes that it recorded.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.load import flatten, parse
from conf.measure_schema import EvaluateConfig
from conf.schema import TrainConfig
from conf.sweep_schema import SweepConfig
from lightning_modules.mlflow_store import no_such_run
from lightning_modules.run_dir import config_hash, read_result, write_json
from lightning_modules.tracking import KEY_TAG, Tracker
from sweeps.stores.store import Store
from sweeps.trials.identity import read_identity, write_identity

if TYPE_CHECKING:
    from mlflow.tracking.client import MlflowClient

OWN_FILES = ("config.yaml", "metrics.jsonl", "evaluation.json", "result.json")  # others are rewritten later
REPORT = ("report.txt", "report.html", "results.csv")


def find_run(client: "MlflowClient", run_id: str) -> tuple[Any, list[str]]:
    """The run, and a line if it was in the trash; None where the store knows nothing of it."""
    try:
        run = client.get_run(run_id)
    except Exception as error:
        if no_such_run(error):
            return None, []
        raise
    if run.info.lifecycle_stage == "active":
        return run, []
    client.restore_run(run_id)
    return client.get_run(run_id), [f"MLflow run {run_id} ({run.info.run_name}): was deleted; restored"]


def stage_tracker(config: SweepConfig, study_dir: Path, stage: str) -> Tracker:
    """Records the run above a stage's trials; every later start finds it again."""
    folder = study_dir / stage
    folder.mkdir(exist_ok=True)
    tags = {"sweep": config.name, "stage": stage, "study_dir": str(study_dir)}
    params = {key: value for key, value in flatten(config).items() if value not in (None, {}, [])}
    return Tracker(config.tracking, folder, name=f"{config.name}/{stage}", params=params, tags=tags)


def remake_stage(
    store: Store, client: "MlflowClient", experiment: str, stage: str, status: str
) -> tuple[Any, list[str]]:
    """The run above a stage's trials, whose studies then name it."""
    config = parse(SweepConfig, [str(store.study_dir / "sweep.yaml")])  # as it was given
    tracker = stage_tracker(config, store.study_dir, stage)
    old = _noted(tracker.run_dir)
    run = _remake(client, experiment, tracker, status, {})
    if run is None:
        return None, []
    for study in store.load_studies():
        if study.user_attrs.get("mlflow_run_id") == old["run_id"]:
            study.set_user_attr("mlflow_run_id", run.info.run_id)
    return run, [_line(old["run_id"], run, stage)]


def remake_run(
    client: "MlflowClient",
    experiment: str,
    config: SweepConfig,
    folder: Path,
    status: str,
    tags: Mapping[str, str],
) -> tuple[Any, list[str]]:
    """The run of a directory whose work is done."""
    result, old = read_result(folder), _noted(folder)
    assert result is not None
    file = str(folder / "config.yaml")
    try:
        ours: TrainConfig | EvaluateConfig
        if result["command"] == "train":
            ours = parse(TrainConfig, [file])
            described = _trained(ours, folder, result)
        else:
            ours = parse(EvaluateConfig, [file])
            described = _evaluated(ours, folder)
    except ValueError as error:
        return None, [
            f"MLflow run {old['run_id']} ({tags['trial']}): is gone and cannot be made anew: {error}"
        ]
    tracker = Tracker(config.tracking, folder, **described)
    run = _remake(client, experiment, tracker, status, {**ours.tracking.tags, **tags})
    if run is None:
        return None, []
    write_json(folder / "result.json", result | {"mlflow_run_id": run.info.run_id})
    identity = read_identity(folder)
    if identity is not None:
        write_identity(folder, identity | {"mlflow_run_id": run.info.run_id})
    return run, [_line(old["run_id"], run, tags["trial"])]


def _remake(
    client: "MlflowClient", experiment: str, tracker: Tracker, status: str, tags: Mapping[str, str]
) -> Any:
    """A run with all that the directory holds; None where the store did not take it all, for another time.

    The directory names it last: a process killed before finds it again by its key.
    """
    old = _noted(tracker.run_dir)
    made = client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{old['key']}'", max_results=1)
    began, ended = _times(tracker)
    if made:
        run = made[0]
    else:
        names = {"mlflow.runName": tracker.name, KEY_TAG: old["key"], "replaces": old["run_id"]}
        tags = {"run_dir": str(tracker.run_dir.absolute()), **tracker.tags, **tags, **names}
        run = client.create_run(experiment, start_time=began, tags=tags)
    tracker.take_over(client, run)
    _send_files(tracker)
    tracker.close(status)
    if not tracker.complete:
        return None
    client.set_terminated(run.info.run_id, status, ended)
    write_json(tracker.run_dir / "tracking.json", {"key": old["key"], "run_id": run.info.run_id})
    return client.get_run(run.info.run_id)


def _send_files(tracker: Tracker) -> None:
    folder = tracker.run_dir
    evaluation = folder / "evaluation.json"
    if evaluation.is_file():
        from lightning_modules.evaluation.run import send_evaluation

        send_evaluation(tracker, json.loads(evaluation.read_text()))
        return
    is_stage = not (folder / "config.yaml").is_file()
    home, names = (folder.parent, REPORT) if is_stage else (folder, ("config.yaml", "result.json"))
    for path in [home / name for name in names]:
        if path.is_file():
            tracker.log_artifact(path)
    for path in sorted((home / "figures").glob("*.png")):
        tracker.log_artifact(path, "figures")


def _times(tracker: Tracker) -> tuple[int, int]:
    """Within which the lost run began and ended, in milliseconds: of its first point or file and its last."""
    files = [tracker.run_dir / name for name in OWN_FILES]
    written = [int(1000 * path.stat().st_mtime) for path in files if path.is_file()]
    points = [point.time for point in tracker.metrics.points]
    times = points + written or [int(1000 * time.time())]
    return min(times), max(times)


def _noted(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tracking.json").read_text())


def _line(old: str, run: Any, name: str) -> str:
    return f"MLflow run {old} ({name}): was deleted; made anew from its directory as {run.info.run_id}"


def _trained(config: TrainConfig, folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    tags = {"seed": str(config.seed), "config_hash": config_hash(config)}
    tags |= {"continues": config.continue_from} if config.continue_from else {}
    tags |= {"pruned": "true"} if result["status"] == "pruned" else {}
    return {"name": folder.name, "params": flatten(replace(config, run_dir=str(folder))), "tags": tags}


def _evaluated(config: EvaluateConfig, folder: Path) -> dict[str, Any]:
    from lightning_modules.checkpoints import load_config
    from lightning_modules.evaluation.run import run_tags
    from lightning_modules.measuring import params, run_name

    described = {"name": run_name(config, folder), "tags": run_tags(config)}
    return described | {"params": params(config, load_config(config.checkpoint))}

"""One identity: trial number, run directory, MLflow run, cluster jobs and checkpoints name each other.

Optuna trial    attributes run_dir, mlflow_run_id, holders (job, host, process of every worker it had)
run directory   trial.json: the trial, its plan and point, its MLflow run, its holders, what it continues
MLflow run      tags sweep, stage, trial, trial_number, run_dir, slurm_chain, checkpoint or continues
checkpoint      its config, which holds the tags above; step; mlflow_run_id
"""

import json
from pathlib import Path
from typing import Any

from optuna.study import Study

from lightning_modules.job import jobs_of
from lightning_modules.run_dir import write_json
from sweeps.planning.samplers import point_of
from sweeps.stores.studies import trial_name

FILE = "trial.json"


def identity_of(study: Study, trial: Any, sweep: str, further: dict[str, Any]) -> dict[str, Any]:
    """What trial.json says. trial: Optuna's, running or frozen."""
    attributes = trial.user_attrs
    return {
        "sweep": sweep,
        "stage": study.user_attrs["stage"],
        "study": study.study_name,
        "trial": trial_name(study, trial.number),
        "number": trial.number,
        "plan": attributes["plan"],
        "planned": {name: attributes[name] for name in attributes["planned"]},
        "fixed": attributes["fixed"],
        "point": point_of(trial),
        "parameters": trial.params,
        "holders": attributes.get("holders", []),
        "slurm_chain": jobs_of(attributes.get("holders", [])),
        **further,
    }


def tags_of(identity: dict[str, Any]) -> dict[str, str]:
    """The same, as tags of the trial's MLflow runs."""
    names = ("sweep", "stage", "trial")
    jobs = {"slurm_chain": identity["slurm_chain"]} if identity["slurm_chain"] else {}
    return {name: identity[name] for name in names} | {"trial_number": str(identity["number"])} | jobs


def write_identity(run_dir: Path, identity: dict[str, Any]) -> None:
    write_json(run_dir / FILE, identity)


def read_identity(run_dir: Path) -> dict[str, Any] | None:
    """What a run directory says of itself; None where it says nothing that can be read."""
    try:
        return json.loads((run_dir / FILE).read_text())
    except (OSError, json.JSONDecodeError):
        return None


def mlflow_run_id(run_dir: Path) -> str | None:
    """Of the run directory's own MLflow run."""
    try:
        return json.loads((run_dir / "tracking.json").read_text())["run_id"]
    except (OSError, json.JSONDecodeError):
        return None


def last_sign_of_life(run_dir: Path) -> float:
    """When a file of the run directory was last written; 0 where there is none."""
    times = [path.stat().st_mtime for path in run_dir.rglob("*") if path.is_file()]
    return max(times, default=0.0)

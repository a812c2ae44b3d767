"""What SLURM tells a process: is it a rank that srun started, and which start of which job is this?

A run directory remembers its starts in slurm.json; its MLflow run carries them as tags. Starting a job again
is the work of its batch script, for scontrol may be out of reach here, in a container say: the script names a
file in LONGSTATE_REQUEUE, and a run that a signal has ended leaves that file once everything is saved.
"""

import json
import os
import signal
import time
from pathlib import Path

from lightning_modules.job import job_id, restart_count
from lightning_modules.run_dir import is_rank_zero, write_json

REQUEUE_FILE = "LONGSTATE_REQUEUE"

# They make a process a rank of a step. One that such a rank starts by itself, a sweep's trial, is none.
RANK_VARIABLES = (
    *("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_ID", "SLURM_STEPID", REQUEUE_FILE),
)


def is_rank() -> bool:
    """Whether srun started this process: it is one rank of its step, and nobody needs to start the others."""
    return "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ


def environment_for_child() -> dict[str, str]:
    """This process's environment for one that is no rank of our step."""
    return {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}


def record_start(run_dir: Path) -> dict[str, str]:
    """Note in run_dir/slurm.json that this job has started here; returns the tags of the MLflow run.

    Outside SLURM there is nothing.
    """
    job, restarts = job_id(), restart_count()
    if job is None:
        return {}
    file = run_dir / "slurm.json"
    starts = json.loads(file.read_text()) if file.is_file() else []
    if not starts or (starts[-1]["job_id"], starts[-1]["restart_count"]) != (job, restarts):
        nodes = os.environ.get("SLURM_JOB_NODELIST", "")
        starts.append({"job_id": job, "restart_count": restarts, "nodes": nodes, "time": time.time()})
        write_json(file, starts)
    return {"slurm_job_id": job, "slurm_restart_count": str(restarts)}


def asks_for_requeue(signum: int) -> bool:
    """Tell the batch script, where there is one that listens, to start this run again after `signum`."""
    file = os.environ.get(REQUEUE_FILE)
    if file is None or signum == signal.SIGINT:
        return False
    if is_rank_zero():
        Path(file).touch()
    return True

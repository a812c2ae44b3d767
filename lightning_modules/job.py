"""Which cluster job this process belongs to, and the chain of jobs that a run has passed through."""

import os
import socket
import time
from typing import Any

JOBS_TAG = "slurm_chain"


def job_id() -> str | None:
    """`4711`, or `4700_3` for an element of an array; None outside SLURM."""
    if os.environ.get("SLURM_ARRAY_TASK_ID"):
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID") or None


def restart_count() -> int:
    """How often the job was requeued."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def job_name() -> str | None:
    """`4711`, `4711:2` after the second requeue; None outside SLURM."""
    job, restarts = job_id(), restart_count()
    return f"{job}:{restarts}" if job and restarts else job


def holder() -> dict[str, Any]:
    """This process, for the record: job (and its own id, which an array element has too), host, pid, time."""
    process = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    return {"job": job_name(), "slurm_job_id": os.environ.get("SLURM_JOB_ID"), **process}


def chain(before: str, job: str | None) -> str:
    """The chain with `job` at its end; a job that is the last already is not repeated."""
    jobs = before.split()
    return " ".join(jobs if job is None or jobs[-1:] == [job] else [*jobs, job])


def jobs_of(holders: list[dict[str, Any]]) -> str:
    """The chain of those who held a trial, one after the other."""
    text = ""
    for one in holders:
        text = chain(text, one["job"])
    return text

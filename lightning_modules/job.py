"""Which cluster job this process belongs to, and the chain of jobs that a run has passed through."""

import os
import socket
import time
from typing import Any

JOBS_TAG = "slurm_jobs"


def job_name() -> str | None:
    """`4711`, `4711[4700_3]` for an element of an array, `4711.r2` after the second requeue; None outside."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return None
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    return job + (f"[{array}_{task}]" if array else "") + (f".r{restarts}" if restarts else "")


def holder() -> dict[str, Any]:
    """This process, for the record: job, host, process id, time."""
    return {"job": job_name(), "host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}


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

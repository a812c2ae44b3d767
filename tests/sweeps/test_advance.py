"""Without a sweeps.run that stays, waiting workers bring a sweep from stage to stage and report it."""

import os
import re
import subprocess
import sys

from mlflow.tracking import MlflowClient
from optuna.trial import TrialState

from sweeps.stores.locks import ProcessLock
from tests.sweeps.test_interruption import TRACKED, states

PENDING = os.EX_TEMPFAIL


def work(sweep, index: int, wait: float = 60.0, **environment: str) -> subprocess.Popen[str]:
    """A worker of the sweep, in a process of its own."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "sweeps.worker",
            "study=runs/tiny",
            f"index={index}",
            f"wait={wait}",
        ],
        cwd=sweep.folder,
        env=os.environ | {"PYTHONPATH": sweep.python_path, "STEP_SECONDS": "0.01"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stage_statuses(sweep) -> dict[str, str]:
    client = MlflowClient(tracking_uri=f"sqlite:///{sweep.folder}/mlflow.db")
    experiment = client.get_experiment_by_name("longstate")
    runs = client.search_runs([experiment.experiment_id])
    return {run.info.run_name: run.info.status for run in runs}


def test_workers_bring_a_planned_sweep_to_its_report_and_leave_failed_trials_failed(sweep) -> None:
    settings = ["mitigation.yaml", *TRACKED]
    planned = sweep.run(*settings, "workers=0", status=PENDING)
    assert "train: 3 trials wait for workers:  python -m sweeps.worker study=runs/tiny" in planned
    assert states(sweep.study_dir) == [TrialState.WAITING] * 3
    assert stage_statuses(sweep) == {"tiny/train": "SCHEDULED"}

    workers = [work(sweep, index, FAIL_IF="model.d_state=4") for index in range(2)]
    said = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert "the sweep is finished and reported" in "".join(said)
    assert re.search(r"mitigation-0001: \d trials wait for workers", "".join(said))
    assert states(sweep.study_dir) == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL]
    assert "Best setting" in (sweep.study_dir / "report.txt").read_text()
    assert stage_statuses(sweep) == {"tiny/train": "FINISHED", "tiny/mitigation-0001": "FINISHED"}

    sweep.run(*settings, "workers=0", "retry_failed=false", status=1)
    assert len(states(sweep.study_dir)) == 3
    again = sweep.run(*settings, "workers=0", status=PENDING)
    assert "1 failed trials are tried again" in again
    assert states(sweep.study_dir)[3:] == [TrialState.WAITING]


def test_a_worker_leaves_the_stages_to_a_sweep_that_conducts_and_waits_no_longer_than_told(sweep) -> None:
    sweep.run("workers=0", status=PENDING)
    conductor = ProcessLock(sweep.study_dir / "locks" / "sweep.lock")
    assert conductor.try_acquire()
    worker = work(sweep, 0, wait=3.0)
    said = worker.communicate(timeout=120)[0]
    conductor.release()
    assert worker.returncode == 0
    assert states(sweep.study_dir) == [TrialState.COMPLETE] * 3
    assert "finished and reported" not in said
    assert not (sweep.study_dir / "report.txt").exists()

"""slurm/train.sbatch on a real SLURM: two nodes, gloo, and every way in which such a job is interrupted."""

from pathlib import Path

import pytest
import torch

from lightning_modules.checkpoints import list_checkpoints
from lightning_modules.mlflow_store import connect
from tests.lightning_modules.launcher import train_on_ranks
from tests.lightning_modules.test_resume import assert_equal, last_step, read_history, read_result
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Checkout

SETTINGS = [
    *("conf/train/smoke.yaml", "trainer.accelerator=cpu", "trainer.threads=1", "trainer.max_steps=150"),
    *("trainer.checkpoint_every=1000", "trainer.val_every=25", "trainer.log_every=2"),
]
NODES = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]


def assert_ends_alike(cut: Path, whole: Path, uri: str) -> None:
    """Weights, optimizer, random state, result and every point in MLflow are the same, bit for bit."""
    first, second = (
        torch.load(list_checkpoints(run / "checkpoints")[0], weights_only=True) for run in (whole, cut)
    )
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "rng", "step", "loops"):
        assert_equal(first[part], second[part], part)
    assert read_result(cut) == read_result(whole)
    assert read_history(uri, cut) == read_history(uri, whole)


def uninterrupted(tmp_path: Path, *settings: str) -> tuple[Path, str]:
    """The same training on two processes without SLURM."""
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    argv = [*SETTINGS, *settings, f"run_dir={tmp_path}/runs/whole", f"tracking.uri={uri}"]
    output = tmp_path / "whole.txt"
    assert train_on_ranks(2, argv, output) == [0, 0], output.read_text()
    return tmp_path / "runs" / "whole", uri


def wait_until_training(cluster: Cluster, run: Path, step: int = 2) -> None:
    cluster.wait_for(lambda: last_step(run) >= step, 120, f"{run} does not train")


def test_signalled_ahead_of_its_limit_it_saves_is_requeued_and_ends_bit_identical(
    cluster: Cluster, checkout: Checkout
) -> None:
    run = checkout.folder / "runs" / "cut"
    # What SLURM sends ahead of the limit, sent now; the limit itself is for the slow test.
    job = checkout.submit(*NODES, "slurm/train.sbatch", *SETTINGS, "run_dir=runs/cut", PREFLIGHT="1")
    wait_until_training(cluster, run)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.start_requeued(job)
    assert not (run / "result.json").exists()
    (saved,) = list_checkpoints(run / "checkpoints")
    run_id = checkout.json("runs", "cut", "tracking.json")["run_id"]
    whole, uri = uninterrupted(checkout.folder)
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED") == "COMPLETED", cluster.logs()

    assert_ends_alike(run, whole, uri)
    logs = [checkout.log(f"train-{job}-{rank}.out") for rank in range(2)]
    assert "ok    all-reduce  gloo over 2 ranks on 2 nodes" in logs[0]
    assert logs[0].count("all-reduce") == 1  # before the first start only
    for log in logs:
        assert "stopped by SIGUSR1; its job is to be requeued" in log
        assert "Traceback" not in log
    assert f"continuing from {saved.relative_to(checkout.folder)}" in logs[0]

    starts = checkout.json("runs", "cut", "slurm.json")
    assert [(s["job_id"], s["restart_count"], s["nodes"]) for s in starts] == [
        (job, 0, "n[0-1]"),
        (job, 1, "n[0-1]"),
    ]
    tags = connect(uri).get_run(run_id).data.tags
    assert checkout.json("runs", "cut", "result.json")["mlflow_run_id"] == run_id
    assert tags["slurm_job_id"] == job
    assert tags["slurm_restart_count"] == "1"
    assert tags["slurm_chain"] == f"{job} {job}:1"

    evaluation = checkout.submit(
        *("--cpus-per-task=1", "slurm/evaluate.sbatch", "checkpoint=runs/cut", "suites=[passkey]"),
        *("passkey.lengths=[128,256]", "passkey.prompts=4", "passkey.depths=0", "device=cpu"),
    )
    assert cluster.wait_for_state(evaluation, "COMPLETED", "FAILED") == "COMPLETED", cluster.logs()
    result = checkout.json("runs", f"evaluate-{evaluation}", "result.json")
    assert result["status"] == "completed"
    tags = connect(uri).get_run(result["mlflow_run_id"]).data.tags
    assert tags["slurm_job_id"] == evaluation


@pytest.mark.slow
def test_cancelled_submitted_again_preempted_and_bereft_of_a_node_it_ends_bit_identical(
    cluster: Cluster, checkout: Checkout
) -> None:
    long = ["trainer.max_steps=800", "trainer.checkpoint_every=10"]
    run = checkout.folder / "runs" / "cut"
    line = [*NODES, "slurm/train.sbatch", *SETTINGS, *long, "run_dir=runs/cut"]

    cancelled = checkout.submit(*line)
    wait_until_training(cluster, run)
    cluster.run("scancel", cancelled)
    cluster.wait_for(lambda: "not requeued" in checkout.log(f"train-{cancelled}.out"), 60, "no last word")
    cluster.wait_for_state(cancelled, "CANCELLED")
    saved = last_step(run)
    assert len(list_checkpoints(run / "checkpoints")) >= 1

    job = checkout.submit(*line)
    wait_until_training(cluster, run, step=saved + 10)
    urgent = checkout.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true")
    cluster.wait_for_state(urgent, "COMPLETED")
    assert "requeued" in checkout.log(f"train-{job}.out")
    cluster.start_requeued(job)

    cluster.wait_for_state(job, "RUNNING")
    wait_until_training(cluster, run, step=last_step(run) + 20)
    cluster.kill_node("n1")
    cluster.run("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=lost")
    cluster.wait_for_state(job, "PENDING")
    assert cluster.job(job)["Restarts"] == "2"
    cluster.start_node("n1")
    cluster.wait_for(cluster.is_idle, 60, "n1 does not come back")
    cluster.start_requeued(job)
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED") == "COMPLETED", cluster.logs()

    whole, uri = uninterrupted(checkout.folder, *long)
    assert_ends_alike(run, whole, uri)
    run_id = checkout.json("runs", "cut", "result.json")["mlflow_run_id"]
    assert connect(uri).get_run(run_id).data.tags["slurm_chain"] == f"{cancelled} {job} {job}:1 {job}:2"


@pytest.mark.slow
def test_the_time_limit_itself_makes_it_save_and_come_back(cluster: Cluster, checkout: Checkout) -> None:
    run = checkout.folder / "runs" / "long"
    settings = [*SETTINGS, "trainer.max_steps=1000000", "run_dir=runs/long"]
    # SLURM looks at limits every 30 seconds and may send the signal a minute early.
    job = checkout.submit(*NODES, "--time=1", "--signal=USR1@40", "slurm/train.sbatch", *settings)
    cluster.wait_for_state(job, "PENDING")
    cluster.wait_for_state(job, "RUNNING")
    wait_until_training(cluster, run)
    cluster.wait_for_state(job, "PENDING")
    saved = list_checkpoints(run / "checkpoints")[0]
    run_id = checkout.json("runs", "long", "tracking.json")["run_id"]
    cluster.start_requeued(job, TimeLimit="10")
    wait_until_training(cluster, run, step=last_step(run) + 10)
    assert f"continuing from {saved.relative_to(checkout.folder)}" in checkout.log(f"train-{job}-0.out")
    assert checkout.json("runs", "long", "tracking.json")["run_id"] == run_id

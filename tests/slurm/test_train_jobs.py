"""slurm/train.sbatch on a real SLURM: two nodes, gloo, and every way in which such a job is interrupted."""

from pathlib import Path

import torch

from lightning_modules.checkpoints import list_checkpoints
from lightning_modules.mlflow_store import connect
from tests.lightning_modules.launcher import train_on_ranks
from tests.lightning_modules.test_resume import assert_equal, last_step, read_history, read_result
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Checkout

SETTINGS = [
    *("conf/train/smoke.yaml", "trainer.accelerator=cpu", "trainer.threads=1", "trainer.max_steps=60"),
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

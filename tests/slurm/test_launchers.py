"""DeepSpeed and context parallelism as users start them: torchrun, srun, and the batch script on SLURM."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lightning_modules.launcher import rendezvous, train
from tests.lightning_modules.test_ranks import SETTINGS, metrics
from tests.lightning_modules.test_zero import check_same
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT, Checkout

# 10 steps, a line of progress at the last; packed documents that begin anywhere.
TRAINING = [
    *(*SETTINGS, "data.documents.layout=packed", "trainer.accelerator=cpu"),
    *("trainer.max_steps=10", "trainer.val_every=5", "trainer.checkpoint_every=5"),
]
ZERO = ["trainer.strategy=deepspeed", "deepspeed.stage=2"]
CONTEXT = ["trainer.context_parallel=2"]
KINDS = [
    [*ZERO, *CONTEXT],
    pytest.param(ZERO, marks=pytest.mark.slow),
    pytest.param(["trainer.strategy=deepspeed", "deepspeed.stage=3"], marks=pytest.mark.slow),
    pytest.param(CONTEXT, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training in one plain process."""
    run_dir = tmp_path_factory.mktemp("one") / "one"
    output = run_dir.with_suffix(".txt")
    assert train([*TRAINING, f"run_dir={run_dir}"], output) == 0, output.read_text()
    return run_dir


def check(one: Path, run_dir: Path, text: str) -> None:
    """Weights, moments and metrics of one process; each line of progress once, whatever the ranks."""
    check_same(one, run_dir, 5, 10)
    assert [record.keys() for record in metrics(one)] == [record.keys() for record in metrics(run_dir)]
    assert text.count("step 10/10  3.84K/3.84K tokens") == 1, text
    assert text.count("dtypes") == 1
    assert "Traceback" not in text


def srun(checkout: Checkout, *arguments: str) -> str:
    """A step of two nodes with a rank each; what its ranks print."""
    command = [*("srun", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"), *arguments]
    done = subprocess.run(
        command, cwd=checkout.folder, env=checkout.cluster.environment, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr + checkout.cluster.logs()
    return done.stdout


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_torchrun(tmp_path: Path, one: Path, kind: list[str]) -> None:
    port = rendezvous()["MASTER_PORT"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    settings = [*TRAINING, *kind, "trainer.devices=2", f"run_dir={tmp_path}/run"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "lightning_modules.train", *settings],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    check(one, tmp_path / "run", done.stdout)


@pytest.mark.slow  # the batch script runs srun too
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_srun(cluster: Cluster, checkout: Checkout, one: Path, kind: list[str]) -> None:
    settings = [*TRAINING, *kind, "trainer.num_nodes=2", "run_dir=runs/run"]
    text = srun(checkout, sys.executable, "-m", "lightning_modules.train", *settings)
    check(one, checkout.folder / "runs" / "run", text)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_sbatch(cluster: Cluster, checkout: Checkout, one: Path, kind: list[str]) -> None:
    nodes = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
    job = checkout.submit(*nodes, "slurm/train.sbatch", *TRAINING, *kind, "run_dir=runs/run")
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED", seconds=240) == "COMPLETED", cluster.logs()
    text = "".join(checkout.log(f"train-{job}-{rank}.out") for rank in (0, 1))
    check(one, checkout.folder / "runs" / "run", text)

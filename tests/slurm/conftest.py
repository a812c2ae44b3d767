"""One pretend cluster for all tests here, and a checkout of the project to submit from."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, why_not

ROOT = Path(__file__).parents[2]
PARTS = ("conf", "data", "kernels", "lightning_modules", "sweeps", "slurm", "pyproject.toml")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Checkout:
    """The project as a user has it, with its runs and logs; jobs are submitted from here."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        for part in PARTS:
            (folder / part).symlink_to(ROOT / part)
        (folder / "logs").mkdir()
        cluster.job_logs = folder / "logs"

    def submit(self, *arguments: str, program: str = "sbatch", **environment: str) -> str:
        """Submit a job from the root of the checkout; returns its id, or what a script of ours prints."""
        line = ["sbatch", "--parsable", *arguments] if program == "sbatch" else [program, *arguments]
        settings = {"VENV": sys.prefix, "LOCAL_SCRATCH": str(self.folder), "PREFLIGHT": "0"}
        done = subprocess.run(
            line,
            cwd=self.folder,
            env=self.cluster.environment | settings | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def log(self, name: str) -> str:
        return (self.folder / "logs" / name).read_text()

    def json(self, *path: str) -> Any:
        return json.loads(self.folder.joinpath(*path).read_text())


@pytest.fixture
def checkout(tmp_path: Path, cluster: Cluster) -> Iterator[Checkout]:
    yield Checkout(tmp_path, cluster)
    # the next test finds empty nodes
    subprocess.run(["scancel", "--user=root"], env=cluster.environment, check=True, timeout=60)
    subprocess.run(["scancel", "--signal=KILL", "--full", "--user=root"], env=cluster.environment, timeout=60)
    for node in cluster.nodes:
        if node not in cluster.daemons:
            cluster.start_node(node)
    cluster.wait_for(cluster.is_idle, 60, "the nodes do not come back")

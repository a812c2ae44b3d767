"""A sweep in a directory of its own, with commands that take milliseconds in place of training."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.sweeps.postgres_server import INSTALL, Server, binaries, server

ROOT = Path(__file__).parents[2]

BASE = """\
model: {d_model: 32, n_layers: 1, d_state: 16, headdim: 16}
data: {train_length: 128, batch_size: 2}
trainer: {max_steps: 10}
"""
SWEEP = """\
name: tiny
train:
  base: base.yaml
  space: {model.d_state: [16, 64, 4]}
tracking: {enabled: false}
"""
MITIGATION = """\
mitigation:
  space:
    forget_more: {alpha_scale: [1.0, 0.999], insert_scale: [1.0]}
    delta_scale: {delta_scale: [0.5]}
"""


class SweepProcess:
    """`python -m sweeps.run` in a process of its own, and what there is to do to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.study_dir = folder / "runs" / "tiny"
        self.process: subprocess.Popen[str] | None = None
        self.python_path = os.pathsep.join([str(ROOT / "tests" / "sweeps" / "stand_ins"), str(ROOT)])
        (folder / "base.yaml").write_text(BASE)
        (folder / "sweep.yaml").write_text(SWEEP)
        (folder / "mitigation.yaml").write_text(MITIGATION)

    def start(self, *overrides: str, step_seconds: float = 0.01, **environment: str) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sweeps.run", "sweep.yaml", *overrides],
            cwd=self.folder,
            env=os.environ
            | {"PYTHONPATH": self.python_path, "STEP_SECONDS": str(step_seconds)}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return self.process

    def run(self, *overrides: str, status: int = 0, step_seconds: float = 0.01, **environment: str) -> str:
        """Run to the end; returns what it printed."""
        process = self.start(*overrides, step_seconds=step_seconds, **environment)
        output = process.communicate(timeout=240)[0]
        assert process.returncode == status, output
        return output

    def finish(self) -> str:
        """Wait for a successful end; returns what it printed."""
        assert self.process is not None
        output = self.process.communicate(timeout=240)[0]
        assert self.process.returncode == 0, output
        return output

    def wait_for(self, condition: Callable[[], object], seconds: float = 120.0) -> None:
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.02)

    def wait_until_training(self, trials: int = 1) -> None:
        """Until that many trials have counted some steps."""
        self.wait_for(lambda: len(self.running_trials()) >= trials)

    def running_trials(self) -> list[Path]:
        pattern = self.study_dir.glob("train/trial-*/metrics.jsonl")
        return [
            m.parent for m in pattern if len(m.read_text()) > 100 and not (m.parent / "result.json").exists()
        ]

    def processes(self, module: str) -> list[psutil.Process]:
        """Processes of this sweep that run `module`."""
        found = []
        for process in psutil.process_iter(["cmdline", "cwd"]):
            command = process.info["cmdline"] or []
            if (
                module in command
                and process.info["cwd"] == str(self.folder)
                and "tether" not in " ".join(command)
            ):
                found.append(process)
        return found

    def kill(self, module: str) -> psutil.Process:
        """SIGKILL one process of this sweep that runs `module`."""
        process = self.processes(module)[0]
        process.kill()
        return process

    def wait_until_gone(self, module: str, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while self.processes(module):
            assert time.monotonic() < deadline, f"still there: {self.processes(module)}"
            time.sleep(0.02)


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[SweepProcess]:
    process = SweepProcess(tmp_path)
    yield process
    if process.process is not None and process.process.poll() is None:
        process.process.send_signal(signal.SIGKILL)
        process.process.communicate()
    for module in ("sweeps.worker", "lightning_modules.train", "lightning_modules.evaluate"):
        process.wait_until_gone(module, seconds=40.0)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """One PostgreSQL for the tests of this process."""
    if binaries() is None:
        pytest.skip(f"no PostgreSQL here: {INSTALL}")
    with server() as running:
        yield running


@pytest.fixture
def postgres(postgres_server: Server) -> str:
    """The URL of an empty database."""
    return postgres_server.make_database(f"db{uuid.uuid4().hex[:12]}")


@pytest.fixture(params=["journal", "postgres"])
def storage_uri(request: pytest.FixtureRequest) -> str | None:
    """Each kind of storage in turn."""
    return request.getfixturevalue("postgres") if request.param == "postgres" else None

"""The sweep under test: its folder, its command, its processes, and what was seen from outside."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.campaign.ledger import HOME

ROOT = Path(__file__).parents[2]
HOOKS, STAND_INS = (Path(__file__).parent / name for name in ("hooks", "stand_ins"))
WORKER, TRIAL = "sweeps.worker", "lightning_modules."

BASE = """\
model: {d_model: 32, n_layers: 1, d_state: 16, headdim: 16, chunk_size: 32}
data: {train_length: 128, batch_size: 8, val_sequences: 16}
trainer: {max_steps: 24, checkpoint_every: 4, keep_last: 2}
"""
REAL_BASE = """\
model: {d_model: 32, n_layers: 1, d_state: 16, headdim: 16, chunk_size: 32}
data: {train_length: 128, batch_size: 8, val_sequences: 16}
optim: {warmup_steps: 5}
trainer: {max_steps: 60, log_every: 5, val_every: 30, checkpoint_every: 10, keep_last: 3}
"""
SPACES = {
    "grid": "{model.d_state: [8, 16, 32], optim.lr: [0.001, 0.004]}",
    "qmc": "{model.d_state: [8, 16, 32], optim.lr: {low: 0.0001, high: 0.01, log: true}}",
    "tpe": "{model.d_state: [8, 16, 32], optim.lr: {low: 0.0001, high: 0.01, log: true}}",
}
TRIALS = {"grid": 12, "qmc": 12, "tpe": 12}


@dataclass(kw_only=True)
class Spec:
    """A sweep. real: trials are real trainings of a tiny model (and fewer)."""

    sampler: str = "grid"
    uri: str | None = None
    tracked: bool = False
    real: bool = False
    workers: int = 2
    trials: int | None = None

    @property
    def budget(self) -> int:
        return self.trials or (4 if self.real else TRIALS[self.sampler])

    def text(self, name: str) -> str:
        budget = "" if self.sampler == "grid" else f"  budget: {{trials: {self.budget}}}\n"
        seeds = {12: "[0, 1]", 4: "[0]"}.get(self.budget, f"[{', '.join(map(str, range(self.budget // 6)))}]")
        space = (
            "{model.d_state: [8, 16], optim.lr: [0.001, 0.004]}" if self.budget == 4 else SPACES[self.sampler]
        )
        store = f"storage: {{uri: '{self.uri}', patience: 90}}\n" if self.uri else "storage: {patience: 90}\n"
        lengths = "passkey.lengths: [128, 256], passkey.prompts: 4"
        suite = f"  metric: val/loss\n  direction: minimize\nevaluate: {{suites: [passkey], {lengths}}}\n"
        suite = suite if self.real else ""
        uri = "sqlite:///tracking/mlflow.db"
        return (
            f"name: {name}\nworkers: {self.workers}\nthreads: 1\ntrain:\n  base: base.yaml\n"
            f"  space: {space}\n  sampler: {self.sampler}\n  seeds: {seeds}\n{budget}{suite}{store}"
            f"tracking: {{enabled: {str(self.tracked).lower()}, uri: '{uri}'}}\n"
        )


@dataclass(kw_only=True)
class Arena:
    folder: Path
    spec: Spec
    name: str
    step_seconds: float = 0.03
    small_disk: bool = False
    process: subprocess.Popen | None = None
    outputs: list[str] = field(default_factory=list)  # of every start

    def __post_init__(self) -> None:
        for path in (self.home / "armed", self.home / "fired"):
            path.mkdir(parents=True)
        (self.folder / "base.yaml").write_text(REAL_BASE if self.spec.real else BASE)
        (self.folder / "sweep.yaml").write_text(self.spec.text(self.name))
        if self.small_disk:
            (self.folder / "runs").mkdir()
            mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(self.folder / "runs")]
            subprocess.run(mount, check=True)

    @property
    def home(self) -> Path:
        """The campaign's own notes, which no fault touches."""
        return self.folder / "campaign"

    @property
    def study_dir(self) -> Path:
        return self.folder / "runs" / self.name

    @property
    def environment(self) -> dict[str, str]:
        paths = [HOOKS, ROOT] if self.spec.real else [HOOKS, STAND_INS, ROOT]
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "STEP_SECONDS": str(self.step_seconds),
            HOME: str(self.home),
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> None:
        output = (self.folder / f"output-{len(self.outputs)}.txt").open("w")
        with output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sweeps.run", "sweep.yaml"],
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.outputs.append(output.name)

    def last_output(self) -> str:
        return Path(self.outputs[-1]).read_text()

    def processes(self, module: str) -> list[psutil.Process]:
        """Processes of this sweep that run a module whose name begins like this."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if "-m" not in command or any("tether.py" in word for word in command):
                continue
            runs = command[command.index("-m") + 1]
            with suppress(psutil.Error):
                if runs.startswith(module) and process.cwd() == str(self.folder):
                    found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def kill_everything(self) -> None:
        """As a host that loses power: nobody learns of another's death."""
        assert self.process is not None
        doomed = [p for module in ("sweeps.", TRIAL) for p in self.processes(module)]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for one in doomed:
                with suppress(psutil.Error):
                    one.send_signal(number)
        self.process.wait()
        self.wait_until_gone()

    def wait_until_gone(self, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while self.processes("sweeps.") or self.processes(TRIAL):
            if time.monotonic() > deadline:
                left = self.processes("sweeps.") + self.processes(TRIAL)
                raise AssertionError(f"processes that outlive their sweep: {left}")
            time.sleep(0.05)

    def command(self, module: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, f"study={self.study_dir}"],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def clean(self) -> None:
        """End what is left and give the disk back."""
        for module in ("sweeps.", TRIAL):
            for process in self.processes(module):
                with suppress(psutil.Error):
                    process.kill()
        if self.process is not None:
            self.process.wait()
        if self.small_disk:
            subprocess.run(["umount", "-l", str(self.folder / "runs")], check=True)
        shutil.rmtree(self.folder, ignore_errors=True)

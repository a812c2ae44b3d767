"""README's commands run as they stand, in a folder that holds nothing but the project's packages.

The first starts Python anew, the others in a process that has made the slow imports already.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lightning_modules.launcher import run_python

ROOT = Path(__file__).parents[1]
PACKAGES = ("conf", "data", "kernels", "lightning_modules", "sweeps")
TINY_DOCUMENTS = [
    "trainer.max_steps=2",
    "model.d_model=32",
    "model.n_layers=1",
    "model.headdim=16",
    "data.train_length=64",
    "data.val_sequences=8",
    "data.documents.min_tokens=1",
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def commands(prefix: str) -> list[list[str]]:
    """Every line of the shell blocks that starts with `prefix`, comments dropped."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(prefix)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    for package in PACKAGES:
        (folder / package).symlink_to(ROOT / package)
    return folder


def run_anew(command: list[str], folder: Path) -> str:
    assert command[0] == "python"
    environment = os.environ | {"PYTHONWARNINGS": "default"}
    line = [sys.executable, *command[1:]]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def run(command: list[str], folder: Path) -> str:
    output = folder / "output.txt"
    output.unlink(missing_ok=True)
    status = run_python(command, folder, output)
    assert status == 0, f"{shlex.join(command)}\n{output.read_text()[-4000:]}"
    return output.read_text()


def test_first_steps_in_shell_and_python(workspace: Path) -> None:
    train, *evaluations, diagnose = commands("python -m lightning_modules")[:4]
    assert "lightning_modules.train" in train
    assert "completed" in run_anew(train, workspace)
    (continuation,) = (c for c in commands("python") if "conf/train/continue-passed.yaml" in c)
    assert "completed" in run([*continuation, "trainer.max_steps=3"], workspace)
    for evaluate in evaluations:
        assert "lightning_modules.evaluate" in evaluate
        assert "exact match" in run(evaluate, workspace)
    assert "lightning_modules.diagnose" in diagnose
    assert "diagnosis.html" in run(diagnose, workspace)
    (generate,) = commands("python -m lightning_modules.generate")
    assert run([*generate, "max_new_tokens=5"], workspace)
    (snippet,) = blocks("python")
    run(["python", "-c", snippet], workspace)


def test_training_on_own_text(workspace: Path) -> None:
    (command,) = [c for c in commands("python") if "conf/train/documents.yaml" in c]
    source = workspace / "path" / "to" / "folder"
    source.mkdir(parents=True)
    for i in range(20):
        (source / f"{i}.txt").write_text(f"Document {i}. " * 40)
    assert "completed" in run([*command, *TINY_DOCUMENTS], workspace)


@pytest.mark.slow
def test_sweep(workspace: Path) -> None:
    (sweep,) = commands("python -m sweeps.run")
    assert "Figures:" in run_anew(sweep, workspace)


def test_every_make_target_named_exists() -> None:
    for target in set(re.findall(r"(?m)(?:^|`)make ([a-z-]+)", (ROOT / "README.md").read_text())):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200

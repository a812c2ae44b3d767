"""Too little disk or memory ends a run with one line that says what to do."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_modules.callbacks import saving
from lightning_modules.checkpoints import checkpoint_path, list_checkpoints
from lightning_modules.language_model import LanguageModel
from lightning_modules.memory import out_of_memory
from lightning_modules.train import main
from tests.lightning_modules.test_ranks import SETTINGS


def failing_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Train, and fail; the one line that is said of it."""
    with pytest.raises(SystemExit) as raised:
        main([*SETTINGS, "trainer.accelerator=cpu", f"run_dir={run_dir}"])
    assert raised.value.code == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return line


def test_a_full_disk_is_noticed_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "the disk lacks 0.3 MiB for a checkpoint: free some" in failing_run(tmp_path / "run", capsys)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_disk_that_fills_up_is_noticed_before_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 3 and 6 are saved; the second no longer fits. Later the same command goes on."""
    run_dir = tmp_path / "run"
    first = checkpoint_path(run_dir / "checkpoints", 3)

    def usage(path: Path) -> Any:
        return SimpleNamespace(free=1000 if first.exists() else 10**9)

    with monkeypatch.context() as full:
        full.setattr(saving.shutil, "disk_usage", usage)
        line = failing_run(run_dir, capsys)
    assert "MiB for a checkpoint: free some and give the same command again" in line
    assert f"last good one: {first}" in line
    assert list_checkpoints(run_dir / "checkpoints") == [first]
    assert main([*SETTINGS, "trainer.accelerator=cpu", f"run_dir={run_dir}"]) == 0
    assert checkpoint_path(run_dir / "checkpoints", 6).exists()


def test_memory_that_is_not_there_is_said_with_what_needs_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LanguageModel, "training_step", lambda *arguments: torch.empty(2**48))
    line = failing_run(tmp_path / "run", capsys)
    assert "after step 0: no memory for another 1125899906842624 bytes: read fewer tokens at a time" in line
    assert "python -m lightning_modules.plan" in line


def test_a_gpu_s_memory_too() -> None:
    message = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB"
    said = out_of_memory(torch.OutOfMemoryError(message), 7)
    assert "after step 7: no GPU memory for another 2.50 GiB: read fewer tokens" in str(said)
    said = out_of_memory(torch.OutOfMemoryError(message), 7, graphed=True)
    assert "2.50 GiB: train without graphs (trainer.cuda_graphs=false), read fewer tokens" in str(said)
    assert out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 7) is None

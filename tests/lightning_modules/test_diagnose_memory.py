"""Memory of a diagnosis is flat in length."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conf.load import parse
from conf.schema import TrainConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.checkpoints import save_model

ROOT = Path(__file__).parents[2]


def peaks(folder: Path, lengths: tuple[int, int], *settings: str) -> list[float]:
    """Peak memory in MiB of a diagnosis at each length, in a process of its own."""
    config = parse(TrainConfig, ["model.n_layers=1"])
    save_model(Mamba2LM(config.model), folder / "model", config)
    found = []
    for length in lengths:
        command = [
            *(sys.executable, "-m", "lightning_modules.diagnose", f"checkpoint={folder / 'model'}"),
            *(f"run_dir={folder / str(length)}", "tracking.enabled=false", "threads=1", f"length={length}"),
            *settings,
        ]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        result = json.loads((folder / str(length) / "result.json").read_text())
        found.append(result["metrics"]["memory/peak_mib"])
    return found


def test_eight_times_the_tokens_take_the_same_memory(tmp_path: Path) -> None:
    short, long = peaks(tmp_path, (8192, 65_536), "needle_prompts=1", "remembrance=0", "prompts=1")
    assert long < 1.15 * short, (short, long)


@pytest.mark.slow
def test_a_million_tokens_take_the_memory_of_65536(tmp_path: Path) -> None:
    short, long = peaks(tmp_path, (65_536, 1_048_576), "needle_prompts=2")
    assert long < 1.15 * short, (short, long)

"""Memory of the whole command is flat in length."""

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


@pytest.mark.slow
def test_a_million_tokens_take_the_memory_of_65536(tmp_path: Path) -> None:
    """The demo's model, passkey and loss, in processes of their own."""
    config = parse(TrainConfig, [])
    save_model(Mamba2LM(config.model), tmp_path / "demo", config)
    peaks = {}
    for length in (65_536, 1_048_576):
        run_dir = tmp_path / str(length)
        command = [
            *(sys.executable, "-m", "lightning_modules.evaluate", f"checkpoint={tmp_path / 'demo'}"),
            *(f"run_dir={run_dir}", "tracking.enabled=false", "threads=1"),
            *(f"passkey.lengths=[{length}]", "passkey.prompts=1"),
            *("passkey.depths=2", "passkey.prompts_per_depth=1", "passkey.max_depth_length=65536"),
            *(f"loss.length={length}", "loss.prompts=1"),
        ]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        peaks[length] = json.loads((run_dir / "result.json").read_text())["metrics"]["memory/peak_mib"]
    assert peaks[1_048_576] < 1.1 * peaks[65_536], peaks

"""The walk of docs/from-a-checkpoint.md, command by command, on a tiny random checkpoint."""

import re
import shlex
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.lightning_modules.launcher import run_python
from tests.lightning_modules.layouts import config_of, write_state_spaces

ROOT = Path(__file__).parents[1]
PACKAGES = ("conf", "data", "kernels", "lightning_modules", "sweeps")
UNTRACKED = "tracking.enabled=false"
QUICK = {
    "train": ["trainer.max_steps=4", "data.val_sequences=8", UNTRACKED],
    "evaluate": ["passkey.prompts=2", "passkey.depths=1", "passkey.prompts_per_depth=2", UNTRACKED],
    "diagnose": ["needle_prompts=2", "refine=0", "prompts=1", "remembrance=0", UNTRACKED],
    "convert": [],
}


def test_every_command_of_the_walk(tmp_path: Path) -> None:
    for package in PACKAGES:
        (tmp_path / package).symlink_to(ROOT / package)
    config = config_of({"d_model": 32, "headdim": 16, "d_state": 8, "vocab_size": 256})
    write_state_spaces(tmp_path / "models" / "published", config, torch.bfloat16)
    text = (ROOT / "docs" / "from-a-checkpoint.md").read_text()
    lines = [
        line
        for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(lines) == 7
    for number, line in enumerate(lines):
        command = shlex.split(line)
        name = command[2].removeprefix("lightning_modules.")
        output = tmp_path / f"output-{number}.txt"
        assert run_python([*command, *QUICK[name]], tmp_path, output) == 0, (
            f"{line}\n{output.read_text()[-3000:]}"
        )
    card = (tmp_path / "models" / "continued-hf" / "README.md").read_text()
    assert "- 4 steps at 128 tokens, 8 sequences a step" in card
    assert "initial states: passed" in card
    assert "- started from models/ours" in card
    assert "| 256 | 0." in card
    assert "Heads whose states leave their range" in card
    AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "continued-hf")

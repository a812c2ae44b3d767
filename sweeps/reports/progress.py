"""How far a running trial is, from the files of its run directory."""

import json
import os
from functools import lru_cache
from pathlib import Path

from omegaconf import OmegaConf

from lightning_modules.run_dir import read_result

TAIL_BYTES = 4096


def progress(run_dir: Path) -> tuple[str, float | None]:
    """What the trial is doing, and the share of its training that is done (None before it or after)."""
    if not (run_dir / "config.yaml").exists():
        return "starting", None
    steps = _max_steps(run_dir / "config.yaml")
    if steps is None or read_result(run_dir):
        return "evaluating", None
    step, last = _last_point(run_dir / "metrics.jsonl")
    loss = last.get("train/loss")
    if step is None:
        return "starting", None
    return f"step {step}/{steps}" + (f", loss {loss:.3f}" if loss is not None else ""), step / steps


def speed(run_dir: Path) -> float:
    """Tokens per second of a training as it last said; 0 where it says nothing."""
    if read_result(run_dir):
        return 0.0
    return _last_point(run_dir / "metrics.jsonl")[1].get("train/tokens_per_second", 0.0)


@lru_cache
def _max_steps(config: Path) -> int | None:
    """Steps of a training run; None for an evaluation."""
    return OmegaConf.select(OmegaConf.load(config), "trainer.max_steps")


def _last_point(metrics: Path) -> tuple[int | None, dict[str, float]]:
    """The last step, and the last value of every metric near the file's end."""
    try:
        with metrics.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None, {}
    step, values = None, dict[str, float]()
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the first line of the tail may be cut
            continue
        step, values = record["step"], values | record["metrics"]
    return step, values

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
    step, loss = _last_point(run_dir / "metrics.jsonl")
    if step is None:
        return "starting", None
    return f"step {step}/{steps}" + (f", loss {loss:.3f}" if loss is not None else ""), step / steps


@lru_cache
def _max_steps(config: Path) -> int | None:
    """Steps of a training run; None for an evaluation."""
    return OmegaConf.select(OmegaConf.load(config), "trainer.max_steps")


def _last_point(metrics: Path) -> tuple[int | None, float | None]:
    """Step and training loss (if it has one) of the last complete line."""
    try:
        with metrics.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None, None
    step = loss = None
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the first line of the tail may be cut
            continue
        step, loss = record["step"], record["metrics"].get("train/loss", loss)
    return step, loss

"""How a training run under a pruner learns whether to go on: a file that its worker answers in.

After each validation the points are in run_dir/metrics.jsonl. The worker, which names the file in
LONGSTATE_VERDICT, reads them there, asks its pruner and writes {"step": ..., "prune": ...}. Rank 0 waits for
the answer to its step and tells the other ranks. Without the variable, by hand, nothing is asked.
"""

import json
import os
import sys
import time
from pathlib import Path

from lightning_modules.run_dir import write_json

VARIABLE = "LONGSTATE_VERDICT"
WAIT_SECONDS = 30.0


def write_verdict(path: Path, step: int, prune: bool) -> None:
    write_json(path, {"step": step, "prune": prune})


def is_judged() -> bool:
    """Whether somebody answers. All ranks of a run share the environment, so all agree."""
    return VARIABLE in os.environ


def await_verdict(step: int, seconds: float = WAIT_SECONDS) -> bool:
    """Whether the run shall end at `step`; a worker that does not answer in time lets it go on."""
    path = Path(os.environ[VARIABLE])
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            verdict = json.loads(path.read_text())
        except FileNotFoundError:
            verdict = {"step": -1}
        if verdict["step"] >= step:
            return bool(verdict["prune"])
        time.sleep(0.01)
    print(f"warning: no verdict on step {step} within {seconds:g} s; going on", file=sys.stderr, flush=True)
    return False

"""Stands in for training: counts steps, goes on after a kill, leaves a run's files, refuses a second writer.

STEP_SECONDS: how long a step takes. FAIL_IF: `name=value` of the config, for which it fails. Validates every
trainer.val_every steps (a larger state is worse), and ends there when its worker says so. DAMAGE_STABLE: its
stable.ckpt is cut short.
"""

import fcntl
import json
import os
import sys
import time
from pathlib import Path
from zipfile import ZipFile

from conf.load import flatten, parse
from conf.schema import TrainConfig
from lightning_modules.verdict import await_verdict, is_judged

config = parse(TrainConfig, sys.argv[1:])
run_dir = Path(config.run_dir or "")
lock = (run_dir / "lock").open("w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit("error: two writers on one run directory")
with (run_dir / "starts").open("a") as starts:
    starts.write(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}\n")

name, _, value = os.environ.get("FAIL_IF", "").partition("=")
if name and str(flatten(config)[name]) == value:
    sys.exit("Traceback ...\nerror: loss is not finite in layer 3")

metrics = run_dir / "metrics.jsonl"
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
status = "completed"
step = done or (8 if config.continue_from else 0)
first = step + 1
for step in range(first, config.trainer.max_steps + 1):
    time.sleep(float(os.environ["STEP_SECONDS"]))
    validates = step % config.trainer.val_every == 0
    values = {"train/loss": 1 / step} | ({"val/loss": config.model.d_state / step} if validates else {})
    with metrics.open("a") as file:
        file.write(json.dumps({"step": step, "time": 0, "metrics": values}) + "\n")
    if config.trainer.keep_stable and step == 8:
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        with ZipFile(run_dir / "checkpoints" / "stable.ckpt", "w") as stable:
            stable.writestr("data", "as whole as PyTorch's")
        if "DAMAGE_STABLE" in os.environ:
            os.truncate(run_dir / "checkpoints" / "stable.ckpt", 40)
    if validates and step < config.trainer.max_steps and is_judged() and await_verdict(step):
        status = "pruned"
        break
result = {
    "status": status,
    "command": "train",
    "steps": step,
    "continued_from": config.continue_from,
    "metrics": {"val/loss": 0.5},
    "mlflow_run_id": None,
    "seconds": 2.0,
}
(run_dir / "result.json").write_text(json.dumps(result))

"""Stands in for training: the law of tests.campaign in place of a model, everything around it real: run
directory and lock, checkpoints written aside and renamed, signals, MLflow, result.json.

STEP_SECONDS: how long a step takes."""

import io
import json
import os
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

from conf.load import flatten, from_command_line, user_errors
from conf.schema import TrainConfig
from lightning_modules.run_dir import RunDir, open_run_dir, read_result
from lightning_modules.termination import Termination
from lightning_modules.tracking import Tracker
from tests.campaign import law
from tests.campaign.ledger import note


def main() -> None:
    config = from_command_line(TrainConfig, __doc__ or "", sys.argv[1:])
    path = Path(config.run_dir or "")
    with user_errors():
        result = read_result(path)
        if result is not None and result["tracking_complete"]:
            return
        run = open_run_dir(path, config)
        try:
            train(run, config) if result is None else finish(run, config, result)
        except OSError as error:
            sys.exit(f"error: {error.filename or path}: cannot be written ({error.strerror})")


def train(run: RunDir, config: TrainConfig) -> None:
    step, state = newest(run.checkpoints) or (0, law.begin(config))
    with Termination() as termination, tracker(run, config) as tracked:
        termination.deferred = True
        while step < config.trainer.max_steps:
            time.sleep(float(os.environ["STEP_SECONDS"]))
            step, state = step + 1, law.advance(state, config)
            tracked.log_metrics({"train/loss": law.loss(state)}, step=step)
            at_end = termination.signum or step == config.trainer.max_steps
            if at_end or step % config.trainer.checkpoint_every == 0:
                save(run.checkpoints, step, state, config.trainer.keep_last)
            if termination.signum:
                termination.end(termination.signum)
        result = {
            "status": "completed",
            "command": "train",
            "steps": step,
            "continued_from": None,
            "metrics": {"val/loss": law.loss(state)},
            "state": state,
            "mlflow_run_id": tracked.run_id,
            "tracking_complete": False,
            "seconds": 1.0,
        }
        run.write_result(result)
        note("completed", run.path)
    run.write_result(result | {"tracking_complete": tracked.complete})


def finish(run: RunDir, config: TrainConfig, result: dict[str, Any]) -> None:
    """What a kill after the result has left open in MLflow."""
    with tracker(run, config) as tracked:
        pass
    run.write_result(result | {"tracking_complete": tracked.complete})


def tracker(run: RunDir, config: TrainConfig) -> Tracker:
    return Tracker(config.tracking, run.path, name=run.name, params=flatten(config))


def save(folder: Path, step: int, state: law.State, keep: int) -> None:
    """A zip archive, as PyTorch's files are, written aside and renamed."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("state.json", json.dumps({"step": step, "state": state}))
    temporary = folder / ".step.tmp"
    temporary.write_bytes(content.getvalue())
    os.replace(temporary, folder / f"step={step:07d}.ckpt")
    for old in sorted(folder.glob("step=*.ckpt"))[:-keep]:
        old.unlink()


def newest(folder: Path) -> tuple[int, law.State] | None:
    """The newest checkpoint that can be read; as in the real command, an error where none of them can."""
    paths = sorted(folder.glob("step=*.ckpt"), reverse=True)
    for path in paths:
        try:
            with zipfile.ZipFile(path) as archive:
                content = json.loads(archive.read("state.json"))
        except zipfile.BadZipFile:
            print(f"warning: {path}: truncated or damaged; trying the one before", flush=True)
            continue
        return content["step"], content["state"]
    if paths:
        raise ValueError(
            f"{folder}: none of its {len(paths)} checkpoints can be read: delete it to start again"
        )
    return None


if __name__ == "__main__":
    main()

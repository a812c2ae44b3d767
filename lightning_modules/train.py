"""Train one model, or continue where a killed run stopped.

    python -m lightning_modules.train CONFIG.yaml [more.yaml ...] [key=value ...]

YAML files hold differences from the defaults and merge left to right; key=value comes last. The same command
finds its own run again: it continues from the last checkpoint, or prints the result of a completed run.

    python -m lightning_modules.train conf/train/smoke.yaml
    python -m lightning_modules.train conf/train/demo.yaml model.d_state=32 run_dir=runs/small-state
    python -m lightning_modules.train runs/small-state/config.yaml                    # continue or verify it
    python -m lightning_modules.train runs/small-state/config.yaml run_dir=runs/again # repeat it
"""

import signal
import sys
from pathlib import Path
from typing import Any

from conf.load import flatten, from_command_line, user_errors
from conf.schema import TrainConfig, require
from lightning_modules.imports import UNUSED_BY_LIGHTNING, heavy_imports
from lightning_modules.ranks import require_world_size
from lightning_modules.run_dir import (
    RunError,
    is_rank_zero,
    locate,
    open_run_dir,
    read_result,
    require_same_config,
)
from lightning_modules.slurm import asks_for_requeue
from lightning_modules.termination import Terminated, Termination


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    config = from_command_line(TrainConfig, __doc__ or "", argv)
    with user_errors():
        require_world_size(config)
        path = locate(config, argv)
        require_same_config(path, config)
        result = read_result(path)
        if result is None:
            result = train(path, config)
        elif not result["tracking_complete"]:
            result = send_rest(path, config, result)
    if is_rank_zero():
        print_result(path, result)
    return 0


def train(path: Path, config: TrainConfig) -> dict[str, Any]:
    """Run or resume the training in `path`; returns its result. Exits with status 1 if the run fails.

    Raises ValueError (one line), with nothing made, if graphs are asked for and there is no device for them.
    """
    if config.trainer.cuda_graphs:
        with heavy_imports(UNUSED_BY_LIGHTNING):
            import torch

        remedy = "needs a CUDA device: leave it out"
        require(torch.cuda.is_available(), "trainer.cuda_graphs", "true", remedy)
    run = open_run_dir(path, config)
    try:
        # The heavy imports come once the command is known to be right and the directory ours.
        with Termination():
            with heavy_imports(UNUSED_BY_LIGHTNING):
                from lightning_modules.fit import fit

            return fit(run)
    except RunError as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except Terminated as end:
        name = signal.Signals(end.signum).name
        if asks_for_requeue(end.signum):
            # Success: for srun, a rank that ends otherwise takes down those that are still saving.
            print(f"{path}: stopped by {name}; its job is to be requeued and continues it", file=sys.stderr)
            raise SystemExit(0) from None
        print(f"{path}: stopped by {name}; the same command continues", file=sys.stderr)
        raise
    finally:
        run.close()


def send_rest(path: Path, config: TrainConfig, result: dict[str, Any]) -> dict[str, Any]:
    """Send to MLflow what its store could not take while the run lasted."""
    from lightning_modules.tracking import Tracker

    run = open_run_dir(path, config)
    tracker = Tracker(config.tracking, path, name=run.name, params=flatten(config))
    with tracker:
        tracker.log_artifact(path / "result.json")
    result = {**result, "tracking_complete": tracker.complete}
    run.write_result(result)
    run.close()
    return result


def print_result(path: Path, result: dict[str, Any]) -> None:
    print(f"{result['status']}: {path / 'result.json'}")
    for name, value in result["metrics"].items():
        print(f"  {name:<22} {value:,.6g}")


if __name__ == "__main__":
    sys.exit(main())

"""Training trials that one worker trains side by side in one process (lightning_modules.side_by_side).

Each keeps its run directory, config, MLflow run and result; evaluation follows one by one. What the process
leaves unfinished, because it failed or was killed, is trained alone by the trial's own command.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from conf.load import to_yaml
from conf.schema import TrainConfig
from lightning_modules.run_dir import read_result, write_text

Spawn = Callable[[list[str], Path], int]  # command, log -> exit status; raises when the worker is stopped


def share_of(waiting: int, side_by_side: int, workers: int) -> int:
    """How many trials a worker takes at once, so that the other workers have as many."""
    return max(1, min(side_by_side, -(-waiting // workers)))


def train_together(configs: Mapping[Path, TrainConfig], spawn: Spawn) -> None:
    """Train the runs that have no result yet: run directory -> its config."""
    run_dirs = [run_dir for run_dir in configs if read_result(run_dir) is None]
    if len(run_dirs) < 2:
        return
    for run_dir in run_dirs:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not (run_dir / "config.yaml").exists():
            write_text(run_dir / "config.yaml", to_yaml(configs[run_dir]))
    log = run_dirs[0] / "log.txt"
    for other in run_dirs[1:]:
        with (other / "log.txt").open("a") as file:
            file.write(f"trained side by side with others: {log}\n")
    listed = f"run_dirs=[{','.join(map(str, run_dirs))}]"
    spawn([sys.executable, "-m", "lightning_modules.train_side_by_side", listed], log)
    left = [run_dir.name for run_dir in run_dirs if read_result(run_dir) is None]
    if left:
        print(f"not finished side by side, trained alone: {', '.join(left)} ({log} says why)", flush=True)

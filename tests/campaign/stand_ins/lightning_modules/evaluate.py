"""Stands in for evaluation: reads what the stand-in of training has left, measures by the law."""

import os
import sys
import time
from pathlib import Path

from conf.load import from_command_line, to_yaml, user_errors
from conf.measure_schema import EvaluateConfig
from lightning_modules.evaluation.conclusion import conclude, metrics
from lightning_modules.run_dir import read_result, write_json, write_text
from lightning_modules.termination import Termination
from lightning_modules.tracking import Tracker
from tests.campaign import law
from tests.campaign.ledger import note

TRAIN_LENGTH = 128


def main() -> None:
    config = from_command_line(EvaluateConfig, __doc__ or "", sys.argv[1:])
    path = Path(config.run_dir or "")
    with user_errors(), Termination():
        if read_result(path) is not None:
            return
        try:
            evaluate(config, path)
        except OSError as error:
            sys.exit(f"error: {error.filename or path}: cannot be written ({error.strerror})")


def evaluate(config: EvaluateConfig, path: Path) -> None:
    trained = read_result(Path(config.checkpoint))
    if trained is None:
        raise ValueError(f"{config.checkpoint}: has no result")
    score = law.recent_exact(trained["state"])
    path.mkdir(parents=True, exist_ok=True)
    write_text(path / "config.yaml", to_yaml(config))
    with Tracker(config.tracking, path, name=path.parent.name) as tracked:
        time.sleep(5 * float(os.environ["STEP_SECONDS"]))
        rows = [
            {"length": TRAIN_LENGTH * 4**i, "exact": score, "exact_low": score, "exact_high": score}
            for i in range(4)
        ]
        passkey = {"recent": rows, "recall_by_length": rows}
        conclusion = conclude(TRAIN_LENGTH, passkey, None)
        write_json(
            path / "evaluation.json",
            {"train_length": TRAIN_LENGTH, "passkey": passkey, "loss": None, "conclusion": conclusion},
        )
        numbers = metrics(TRAIN_LENGTH, passkey, conclusion)
        tracked.log_metrics(numbers, step=0)
        result = {"status": "completed", "command": "evaluate", "metrics": numbers, "seconds": 1.0}
        write_json(path / "result.json", result | {"mlflow_run_id": tracked.run_id})
        note("completed", path)


if __name__ == "__main__":
    main()

"""Run directories as the commands would leave them, written in microseconds."""

import json
from pathlib import Path

from lightning_modules.evaluation.conclusion import conclude


def leave_training(
    run_dir: Path,
    status: str = "completed",
    mlflow_run_id: str | None = None,
    checkpoint: str | None = None,
) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    result = {"status": status, "command": "train", "metrics": {"val/loss": 0.5, "peak_memory_mib": 100.0}}
    result |= {"mlflow_run_id": mlflow_run_id, "seconds": 2.0, "steps": 10, "tracking_complete": True}
    result["checkpoint"] = checkpoint
    (run_dir / "result.json").write_text(json.dumps(result))


def leave_evaluation(folder: Path, score: float = 0.7) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"length": n, "exact": score, "exact_low": score, "exact_high": score} for n in (128, 2048)]
    passkey = {"recent": rows, "recall_by_length": rows}
    evaluation = {"train_length": 128, "passkey": passkey, "conclusion": conclude(128, passkey, None)}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    metrics = {"passkey/recent_exact_beyond": score}
    result = {"status": "completed", "command": "evaluate", "metrics": metrics}
    (folder / "result.json").write_text(json.dumps(result | {"mlflow_run_id": None, "seconds": 1.0}))


def leave_trial(run_dir: Path, score: float = 0.7) -> None:
    """A training trial that has done all its work."""
    leave_training(run_dir)
    leave_evaluation(run_dir / "evaluation", score)

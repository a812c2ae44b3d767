"""Stands in for evaluation, a law in place of a model: larger states collapse earlier, forget_more mends it
at a price in length, delta_scale destroys. FAIL_EVALUATE: it fails.

COLLAPSE_BELOW: models trained below so many tokens a d_state lose recent needles, and no others do.
UNSOLVED_SEED: models of this seed have not learned their task."""

import json
import math
import os
import sys
from pathlib import Path

from conf.load import parse
from conf.measure_schema import EvaluateConfig
from conf.schema import TrainConfig
from lightning_modules.evaluation.conclusion import conclude, metrics

config = parse(EvaluateConfig, sys.argv[1:])
if "FAIL_EVALUATE" in os.environ:
    sys.exit("error: no evaluation today")
run_dir = Path(config.run_dir or "")
trained = parse(TrainConfig, [str(Path(config.checkpoint) / "config.yaml")])
train_length = trained.data.train_length
assert (Path(config.checkpoint) / "result.json").exists()


def exact(length: int, depth_loss: float = 0.0) -> float:
    if "COLLAPSE_BELOW" in os.environ:
        if os.environ.get("UNSOLVED_SEED") == str(trained.seed):
            return 0.3
        holds = train_length >= int(os.environ["COLLAPSE_BELOW"]) * trained.model.d_state
        return 1.0 if length == train_length or (holds and not depth_loss) else 0.2
    octaves = math.log2(length / train_length)
    mitigation = config.mitigation
    slope = 0.002 * trained.model.d_state * (0.2 if mitigation.alpha_scale < 1 else 1.0)
    start = 1.0 - 40 * (1 - mitigation.alpha_scale) - 2 * abs(1 - mitigation.delta_scale)
    if trained.model.d_state == 4:
        start = 0.3  # unsolved
    return max(0.0, start - slope * octaves - depth_loss * octaves)


def row(length: int, depth_loss: float) -> dict:
    share = exact(length, depth_loss)
    return {
        "length": length,
        "exact": share,
        "exact_low": max(0, share - 0.05),
        "exact_high": min(1, share + 0.05),
    }


lengths = config.passkey.lengths or [train_length * 4**i for i in range(4)]
passkey = {
    "recent": [row(length, 0.0) for length in lengths],
    "recall_by_length": [row(length, 0.05) for length in lengths[:3]],
}
conclusion = conclude(train_length, passkey, None)
evaluation = {
    "checkpoint": config.checkpoint,
    "train_length": train_length,
    "passkey": passkey,
    "loss": None,
    "conclusion": conclusion,
    "seed": config.seed,
}
(run_dir / "evaluation.json").write_text(json.dumps(evaluation))
result = {
    "status": "completed",
    "command": "evaluate",
    "metrics": metrics(train_length, passkey, conclusion),
    "mlflow_run_id": None,
    "seconds": 1.0,
}
(run_dir / "result.json").write_text(json.dumps(result))

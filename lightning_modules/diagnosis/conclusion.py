"""Where a model collapses, keeping three things apart: unsolved, collapse, forgetting.

Collapse is judged by what the checkpoint was trained on, which is recorded in it. A language model collapses
at the first bucket whose loss exceeds `loss_ratio` times its maximum within the training length (arXiv
2410.07145, section 4.2, which reads 128 prompts). A passkey model collapses at the first prompt length at
which recent needles are lost; needles lost only where they may stand anywhere are forgotten, not collapsed.
"""

import math
from typing import Any

import numpy as np

from conf.diagnosis import ThresholdsConfig
from lightning_modules.diagnosis.reading import Measures

Row = dict[str, Any]


def judge_loss(
    loss: dict[str, Any], train_length: int, vocab_size: int, prompt: str, thresholds: ThresholdsConfig
) -> dict[str, Any]:
    """Collapse by loss; "position" is the first token of the bucket that exceeds the limit.

    On random tokens every model is at chance: whether it is solved cannot be told there and is None.
    """
    bucket = loss["bucket"]
    start = bucket * np.arange(len(loss["loss"]))
    values = np.array([np.inf if value is None else value for value in loss["loss"]])
    inside, beyond = start + bucket <= train_length, start >= train_length
    chance, mean, highest = math.log(vocab_size), values[inside].mean(), values[inside].max()
    solved = None if prompt == "random" else bool(mean < thresholds.chance * chance)
    limit = thresholds.loss_ratio * highest
    above = beyond & (values > limit)
    first = int(np.argmax(above)) if above.any() and solved is not False else None
    furthest = values[beyond].max(initial=0.0)
    return {
        "by": "loss",
        "solved": solved,
        "position": None if first is None else int(start[first]) + 1,
        "loss": None if first is None else _number(values[first]),
        "limit": _number(limit),
        "loss_inside": _number(mean),
        "loss_inside_max": _number(highest),
        "loss_beyond_max": _number(furthest),
        "loss_ratio": _number(furthest / highest) if highest > 0 else None,
        "loss_of_chance": chance,
        "to": round(2 * loss["position"][-1]) - 1 - int(start[-1]),
    }


def judge_needles(recent: list[Row], anywhere: list[Row], thresholds: ThresholdsConfig) -> dict[str, Any]:
    """Collapse by recent needles; "position" is the first length at which they are lost, "held_to" the last
    before it. Forgetting is judged at lengths at which both were asked."""
    first, furthest = recent[0], recent[-1]
    solved = first["exact"] >= thresholds.solved
    lost = next((i for i, row in enumerate(recent) if solved and row["exact"] <= thresholds.lost), None)
    exact = {row["length"]: row["exact"] for row in recent}
    forgotten = [
        row["length"]
        for row in anywhere
        if solved and row["exact"] <= thresholds.lost < exact.get(row["length"], 0.0)
    ]
    loss = np.array([np.inf if row["answer_loss"] is None else row["answer_loss"] for row in recent])
    rises = [i for i in range(1, len(loss)) if solved and loss[i] > thresholds.loss_ratio * loss[0]]
    return {
        "by": "recent needles",
        "solved": solved,
        "position": None if lost is None else recent[lost]["length"],
        "held_to": None if lost is None else recent[lost - 1]["length"],
        "exact": None if lost is None else recent[lost]["exact"],
        "exact_inside": first["exact"],
        "exact_furthest": furthest["exact"],
        "answer_loss_inside": first["answer_loss"],
        "answer_loss_rises": recent[rises[0]]["length"] if rises else None,
        "loss_ratio": _number(loss[1:].max(initial=0.0) / loss[0]) if 0 < loss[0] < np.inf else None,
        "forgetting_position": forgotten[0] if forgotten else None,
        "to": furthest["length"],
    }


def collapse_metrics(collapse: dict[str, Any], measures: Measures) -> dict[str, float]:
    """Flat names -> numbers, finite all of them, so that each can be an objective.

    collapse/position: where the model collapses; where it does not, the length up to which it was read; 0
    where it is unsolved at its own length (collapse/solved is 0 then, 1 else). collapse/loss_ratio: loss
    beyond the training length over that within it, left out where that is not finite.
    collapse/max_head_rms: of any head at any position.
    """
    solved = collapse["solved"] is not False
    position = (collapse["position"] or collapse["to"]) if solved else 0
    ratio = {} if collapse["loss_ratio"] is None else {"collapse/loss_ratio": float(collapse["loss_ratio"])}
    return {
        "collapse/position": float(position),
        "collapse/solved": float(solved),
        **ratio,
        "collapse/max_head_rms": float(measures.values["rms"].max(initial=0.0)),
    }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None

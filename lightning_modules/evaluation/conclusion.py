"""What the measurements say, keeping three things apart: unsolved, collapse, forgetting.

- Unsolved: the model does not know its task at its own training length. Nothing beyond it can be judged.
- Collapse: a solved task, and needles within the last training length are lost because of what came before.
- Forgetting: needles anywhere are lost where recent ones are still found. A limit of capacity, not collapse.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

SOLVED = 0.9  # exact match at the training length from which a task counts as learned
LOST = 0.5  # exact match at or below which needles count as lost

Rows = list[dict[str, Any]]


def conclude(
    train_length: int, passkey: dict[str, Rows] | None, loss: dict[str, Any] | None
) -> dict[str, Any]:
    """The judgement on one evaluation; None where the suite it rests on was not run.

    Returns {"solved", "in_length_exact", "collapse", "collapse_length", "forgetting", "forgetting_length",
    "loss_rises", "loss_in_length", "loss_max_beyond", "summary"}; lengths are the first at which it was seen.
    A cell with non-finite outputs counts as exact match 0.
    """
    conclusion: dict[str, Any] = {
        **dict.fromkeys(("solved", "in_length_exact", "collapse", "collapse_length")),
        **dict.fromkeys(("forgetting", "forgetting_length")),
        **dict.fromkeys(("loss_rises", "loss_in_length", "loss_max_beyond")),
    }
    sentences = []
    if passkey is not None:
        conclusion |= _judge_passkey(train_length, passkey)
        sentences.append(_say_passkey(conclusion, passkey["recent"][-1]))
    if loss is not None:
        conclusion |= _judge_loss(train_length, loss)
        sentences.append(_say_loss(conclusion))
    return conclusion | {"summary": " ".join(sentence for sentence in sentences if sentence)}


def exact_by_length(rows: Rows) -> dict[int, float]:
    return {row["length"]: row["exact"] for row in rows}


def metrics(
    train_length: int, passkey: dict[str, Rows] | None, conclusion: dict[str, Any]
) -> dict[str, float]:
    """Flat names -> numbers, for result.json and the tracking store. What was not measured is left out."""
    flat: dict[str, float | None] = {
        "loss/in_length": conclusion["loss_in_length"],
        "loss/max_beyond": conclusion["loss_max_beyond"],
    }
    if passkey is not None:
        recent, recall = exact_by_length(passkey["recent"]), exact_by_length(passkey["recall_by_length"])
        flat |= {f"passkey/recent_exact_at_{length}": exact for length, exact in recent.items()}
        flat |= {f"passkey/recall_exact_at_{length}": exact for length, exact in recall.items()}
        beyond = [exact for length, exact in recent.items() if length >= 16 * train_length]
        flat["passkey/recent_exact_in_length"] = recent[train_length]
        flat["passkey/recent_exact_beyond"] = float(np.mean(beyond)) if beyond else None
        flat["passkey/recall_exact_in_length"] = recall.get(train_length)
    return {name: value for name, value in flat.items() if value is not None}


def stretches(position: NDArray[np.float64], train_length: int) -> NDArray[np.int64]:
    """Which stretch of one training length each bucket of positions lies in: 0 within training."""
    return ((position - 0.5) // train_length).astype(np.int64)


def _judge_passkey(train_length: int, passkey: dict[str, Rows]) -> dict[str, Any]:
    recent, recall = exact_by_length(passkey["recent"]), exact_by_length(passkey["recall_by_length"])
    # Needles over the whole training length, as in training: the recent window may be shorter.
    in_length = recall.get(train_length, recent[train_length])
    solved = in_length >= SOLVED
    beyond = [length for length in recent if length > train_length]
    collapsed = [length for length in beyond if solved and recent[length] <= LOST]
    forgotten = [length for length in beyond if solved and recall.get(length, 1.0) <= LOST < recent[length]]
    return {
        "solved": solved,
        "in_length_exact": in_length,
        "collapse": bool(collapsed),
        "collapse_length": collapsed[0] if collapsed else None,
        "forgetting": bool(forgotten),
        "forgetting_length": forgotten[0] if forgotten else None,
    }


def _judge_loss(train_length: int, loss: dict[str, Any]) -> dict[str, Any]:
    """Beyond the training length the loss is averaged over stretches of one training length, so that a single
    hard passage of text is not taken for a rise; within it, the highest bucket is what has to be exceeded."""
    position = np.array(loss["position"])
    values = np.array([np.inf if x is None else x for x in loss["loss"]])
    inside = position <= train_length
    stretch = stretches(position, train_length)
    means = [values[stretch == i].mean() for i in np.unique(stretch[~inside])]
    in_length, highest = values[inside].mean(), max(means, default=None)
    return {
        "loss_in_length": _finite(in_length),
        "loss_max_beyond": None if highest is None else _finite(highest),
        "loss_rises": None if highest is None else bool(highest > values[inside].max()),
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _say_passkey(found: dict[str, Any], furthest: dict[str, Any]) -> str:
    in_length = f"{found['in_length_exact']:.2f}"
    if not found["solved"]:
        return (
            f"Unsolved: exact match {in_length} at the training length is below {SOLVED}, so neither "
            "collapse nor forgetting can be judged."
        )
    said = f"Solved at the training length (exact match {in_length})."
    if found["collapse"]:
        length = found["collapse_length"]
        said += f" Collapse: recent needles are lost (exact match at most {LOST}) from {length:,} tokens."
    else:
        length, exact = furthest["length"], furthest["exact"]
        said += f" No collapse to {length:,} tokens: exact match {exact:.2f} on recent needles there."
    if found["forgetting"]:
        length = found["forgetting_length"]
        said += f" Forgetting: needles over all depths are lost at {length:,} tokens, recent ones are not."
    return said


def _say_loss(found: dict[str, Any]) -> str:
    if found["loss_rises"] is None:
        return ""
    if found["loss_rises"]:
        return "Loss beyond the training length exceeds its maximum within."
    return "Loss beyond the training length never exceeds its maximum within."

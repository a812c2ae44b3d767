"""Effective remembrance: how much the next token's distribution owes to what was read at first.

    EffRem_T(t) = TV(q(. | x_[0:T]), q(. | x_[t:T]))                              (arXiv 2507.02782)

TV is the total variation distance, 0 for equal distributions and 1 for disjoint ones. A model that uses its
context wisely loses little with the first tokens and more the nearer t comes to T; one whose state still
holds the beginning is thrown off, EffRem near 1, as soon as a few first tokens are missing.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.evaluation.streaming import Reader, Source

ENDS = 64  # of so many last positions the mean is taken
# Left out from the beginning, as shares of T: dense at both ends.
LEFT_OUT = (1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 15 / 16, 31 / 32)


def starts(length: int) -> list[int]:
    """The t of EffRem at T = `length`: at least one token is left before the first end."""
    last = length - ends(length)
    return sorted({1, *(min(last, max(1, round(share * length))) for share in LEFT_OUT)})


def ends(length: int) -> int:
    return max(1, min(ENDS, length // 4))


def tokens_to_read(length: int, rows: int) -> int:
    return rows * (length + sum(length - t for t in starts(length))) if length else 0


@torch.inference_mode()
def effective_remembrance(reader: Reader, source: Source, length: int) -> dict[str, Any]:
    """EffRem_T(t), T the last positions up to `length`, averaged over them and over rows.

    Returns:
        {"length", "ends": how many positions, "start": the t, "distance": EffRem in [0, 1] at each}.
    """
    whole = _distributions(reader, source, 0, length)
    distances = []
    for start in starts(length):
        part = _distributions(reader, source, start, length)
        distances.append(0.5 * (whole - part).abs().sum(-1).mean().item())
    return {"length": length, "ends": ends(length), "start": starts(length), "distance": distances}


def _distributions(reader: Reader, source: Source, begin: int, end: int) -> Tensor:
    """(rows, ends, vocab) fp32: of the tokens after the last positions, having read from `begin`."""
    _, hidden = reader.read(source, None, begin, end, keep=ends(end))
    return reader.model.lm_head(hidden).float().softmax(-1)

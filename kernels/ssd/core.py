"""What the parts of the scan hand each other: discretised tokens, and a core that scans them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """Discretised inputs, in the order a core takes them."""

    x: Tensor  # (B, T, H, P)
    log_decay: Tensor  # (B, T, H), the logarithm of the retention
    insert: Tensor  # (B, T, H), the weight of x B^T
    B: Tensor  # (B, T, G, N)
    C: Tensor  # (B, T, G, N)

    @property
    def length(self) -> int:
        return self.x.shape[1]

    def span(self, start: int, stop: int) -> "Tokens":
        return Tokens(*(t[:, start:stop] for t in self))


# core(x, log_decay, insert, B, C, D, initial_state, document_starts) -> (y, final_state): a scan of plain
# recurrences, its chunk size bound. `chunked_scan`, `triton_scan` and `naive_scan` are cores.
Core = Callable[..., tuple[Tensor, Tensor]]


def span_of(starts: Tensor | None, start: int, stop: int) -> Tensor | None:
    """Some tokens of document_starts."""
    return None if starts is None else starts[:, start:stop]


def token_counts(starts: Tensor | None, position: Tensor | None, tokens: Tensor) -> Tensor:
    """Tokens of its document before each token, (B, T) int64.

    Args:
        starts: (B, T) bool or None. position: (B,), those before the first token; None for 0.
        tokens: any (B, T, ...) tensor, for its sizes and device.
    """
    batch, length = tokens.shape[:2]
    steps = torch.arange(length, device=tokens.device)
    carried = steps.expand(batch, length) if position is None else position[:, None] + steps
    if starts is None:
        return carried
    last_start = torch.where(starts, steps, -1).cummax(1).values
    return torch.where(last_start >= 0, steps - last_start, carried)

"""Reads token sources of any length through a model, a segment at a time, carrying the recurrent state."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_modules.backbone import Mamba2LM
from lightning_modules.guests.guest import Guest, GuestState
from lightning_modules.mitigations import AnyMitigation
from lightning_modules.state import ModelState

# Tokens [begin, end) of n rows as (n, end - begin) int64, written out on demand: no row ever exists whole.
Source = Callable[[int, int], NDArray[np.int64]]

AnyState = ModelState | GuestState

# Tokens of a forward pass, over all rows, that keep a machine busy: strides of so many are read one by one,
# since the state at the end of a segment costs nothing.
ENOUGH = 1024
MOST = 16  # strides of a segment: their states are in memory together


class Reader:
    """One model under one mitigation, and the tally of what it has read.

    A forward pass covers at most about `segment` tokens over all its rows together, so memory depends on
    `segment` and on the number of recurrent states held, never on the length of a prompt. How tokens are
    split into segments changes results by rounding only.
    """

    def __init__(
        self,
        model: Mamba2LM | Guest,
        mitigation: AnyMitigation,
        segment: int,
        on_tokens: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.model: Any = model  # takes the states that it returned
        self.mitigation, self.segment, self.on_tokens = mitigation, segment, on_tokens
        self.device = model.lm_head.weight.device
        self.tokens, self.seconds = 0, 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    @torch.inference_mode()
    def read(
        self, source: Source, state: AnyState | None, begin: int, end: int, keep: int = 0
    ) -> tuple[AnyState | None, Tensor]:
        """Read tokens [begin, end) of every row.

        Args:
            source: writes out any stretch of the rows.
            state: the state after token begin - 1; None before the first token.
            keep: how many of the last final hidden states to return; at most end - begin.

        Returns:
            The state after token end - 1 (`state` itself when the stretch is empty), and hidden
            (n, keep, d_model).
        """
        kept = []
        for low, high, ids in self._segments(source, begin, end):
            hidden, state = self._forward(ids, state)
            if high > end - keep:
                kept.append(hidden[:, max(0, end - keep - low) :])
        return state, torch.cat(kept, 1) if kept else torch.empty(0)

    @torch.inference_mode()
    def losses(self, source: Source, length: int) -> Iterator[tuple[int, Tensor]]:
        """-log p of tokens 1 .. length given all before, as (position of the first, (n, w) fp32) a segment.

        The source must hold length + 1 tokens; logits exist for a slice of a segment at a time.
        """
        for first, losses, _ in self.losses_from(source, None, 0, length):
            yield first, losses

    @torch.inference_mode()
    def losses_from(
        self, source: Source, state: AnyState | None, begin: int, end: int, stride: int | None = None
    ) -> Iterator[tuple[int, Tensor, AnyState]]:
        """-log p of tokens begin + 1 .. end, and the state behind each segment, as `losses` and `read`.

        stride: segments hold whole strides counted from `begin`, or lie within one.
        """
        for low, high, ids in self._segments(source, begin, end, stride):
            targets = torch.cat([ids[:, 1:], self._ids(source(high, high + 1))], 1)
            start = time.perf_counter()
            losses, state = self.model.token_losses(ids, targets, state, mitigation=self.mitigation)
            self._count(ids, start)
            yield low + 1, losses, state

    def _segments(
        self, source: Source, begin: int, end: int, stride: int | None = None
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Split [begin, end) so that rows x tokens of a segment stay near `self.segment`."""
        if begin == end:
            return
        rows = len(source(begin, begin + 1))
        width = max(1, self.segment // rows)
        unit = self.model.config.chunk_size  # whole chunks of the scan waste no padding
        if stride is not None and stride <= width:
            unit = stride
            width = stride if rows * stride >= ENOUGH else min(width, MOST * stride)
        width -= width % unit if width > unit else 0
        low = begin
        while low < end:
            high = min(low + width, end)
            if stride is not None and stride > width:
                high = min(high, low + stride - (low - begin) % stride)
            yield low, high, self._ids(source(low, high))
            low = high

    def _ids(self, ids: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(ids).to(self.device)

    def _forward(self, ids: Tensor, state: AnyState | None) -> tuple[Tensor, AnyState]:
        start = time.perf_counter()
        hidden, state = self.model.hidden(ids, state, mitigation=self.mitigation)
        self._count(ids, start)
        return hidden, state

    def _count(self, ids: Tensor, start: float) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.tokens += ids.numel()
        self.seconds += time.perf_counter() - start
        self.on_tokens(ids.numel())

"""A sequence that is sharded over ranks: the operators of a layer on a rank's piece."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.context.conv import context_conv1d
from kernels.context.group import Ranks
from kernels.context.scan import context_scan
from kernels.mixer import fused_mixer


class Context(Ranks):
    """Its methods stand in for the functions of the same names: the same arguments of this rank's piece, the
    same results for it. States are the whole sequence's: `initial_state` before the first rank's first token,
    the final state after the last rank's last."""

    def causal_conv1d(self, x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Any:
        return context_conv1d(self, x, weight, bias, **options)

    def ssd_scan(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any) -> Any:
        return context_scan(self, x, dt, A, B, C, **options)

    @property
    def mixer(self) -> Callable[..., Any] | None:
        """What stands in for `fused_mixer`; None with `overlap`, where y is corrected between its parts."""
        if self.overlap:
            return None
        from kernels.context.mixer import context_mixer  # imports triton

        return partial(fused_mixer, run=partial(context_mixer, self))

    def positions(self, position: Tensor, starts: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
        """Tokens since the row's document began, (B,): before this rank's piece and after the last piece.

        position: before the first piece. starts: (B, length) bool of this piece; all ranks have it or none.
        """
        if starts is None:
            return position + self.rank * length, position + self.size * length
        steps = torch.arange(length, device=starts.device)
        last_start = torch.where(starts, steps, -1).amax(1)
        own = torch.where(last_start >= 0, length - last_start, -1)  # since a start in the piece; -1: none
        before = position
        for rank, counted in enumerate(self.all_gather(own)):
            before = position if rank == self.rank else before
            position = torch.where(counted >= 0, counted, position + length)
        return before, position

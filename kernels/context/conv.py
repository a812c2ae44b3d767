"""The causal convolution of a piece: its first tokens read the last inputs of the piece before."""

from typing import Any

import torch
from torch import Tensor

from kernels.context.group import Ranks
from kernels.conv import causal_conv1d


def context_conv1d(
    context: Ranks,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`kernels.conv.causal_conv1d` of this rank's piece (B, T, C), which has at least W - 1 tokens.

    Only the first rank reads `initial_state`, and only it is given the final one: the last inputs of the
    last rank's piece. Elsewhere the state returned is zero.
    """
    lags = weight.shape[1] - 1
    tail = handed_on(x, document_starts, lags)
    if initial_state is None:
        initial_state = x.new_zeros(len(x), x.shape[2], lags)
    before, final = _Halo.apply(tail.transpose(1, 2), initial_state.to(x.dtype), context)
    y, _ = causal_conv1d(x, weight, bias, initial_state=before, document_starts=document_starts, **options)
    return y, final


def handed_on(x: Tensor, document_starts: Tensor | None, lags: int) -> Tensor:
    """The last inputs of a piece that the next one's first tokens read: (B, lags, C), zero where a document
    begins after them. Also the gradient of those, from x's in its place."""
    if x.shape[1] < lags:
        raise ValueError(
            f"x has {x.shape[1]} tokens: a piece of a context group needs at least d_conv - 1 = {lags}"
        )
    tail = x[:, x.shape[1] - lags :]
    if document_starts is None:
        return tail
    documents = document_starts[:, -lags:].cumsum(1)
    return tail * (documents == documents[:, -1:])[..., None]


class _Halo(torch.autograd.Function):
    """(tail of the piece, state before the sequence) -> (inputs before the piece, state after the sequence).

    One exchange in a ring each way: the last rank's tail goes to the first, as the state after the sequence.
    """

    @staticmethod
    def forward(ctx: Any, tail: Tensor, initial: Tensor, context: Ranks) -> tuple[Tensor, Tensor]:
        ctx.context = context
        received = context.shift(tail, 1)
        if context.rank == 0:
            return initial.clone(), received
        return received, torch.zeros_like(received)

    @staticmethod
    def backward(ctx: Any, dbefore: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        context: Ranks = ctx.context
        first = context.rank == 0
        dtail = context.shift(dfinal if first else dbefore, -1)
        return dtail, dbefore if first else None, None

"""Causal depthwise convolution as a sum of shifted, scaled copies, with its own backward.

Written token-major, (B, T, C), as in_proj leaves it, so nothing is transposed; in blocks that stay in the
cache, so that its many cheap passes do not go to memory. The convolution is recomputed in the backward pass:
only the input is kept.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of one block: 1 MiB in fp32, measured best of 2^15 to 2^22.
BLOCK_ELEMENTS = 2**18


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
    activation: bool = True,
) -> tuple[Tensor, Tensor]:
    """y_t = silu(bias + sum_k weight[:, k] x_{t - W + 1 + k}), accumulated in fp32.

    Args:
        x: (B, T, C). weight: (C, W). bias: (C,) or None.
        initial_state: (B, C, W - 1), the inputs before the first token, oldest first; None for zeros.
        document_starts: (B, T) bool; a True token and those after it see nothing before it.
        activation: apply SiLU.

    Returns:
        y (B, T, C) and the final state (B, C, W - 1), both in x's dtype. Inputs before the last document
        start are zero in the final state, so a following piece needs no memory of where documents began.

    Raises:
        ValueError: for shapes that do not fit, naming the argument.
    """
    batch, length, channels = x.shape
    width = weight.shape[1]
    if weight.shape[0] != channels:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected ({channels}, W)")
    if initial_state is None:
        initial_state = x.new_zeros(batch, channels, width - 1)
    elif tuple(initial_state.shape) != (batch, channels, width - 1):
        expected = (batch, channels, width - 1)
        raise ValueError(f"initial_state has shape {tuple(initial_state.shape)}: expected {expected}")
    if document_starts is not None and tuple(document_starts.shape) != (batch, length):
        raise ValueError(f"document_starts has shape {tuple(document_starts.shape)}: expected {(batch, length)}")
    padded = torch.cat([initial_state.transpose(1, 2).to(x.dtype), x], dim=1)
    tail = padded[:, -(width - 1) :]
    if document_starts is not None:
        tail = tail * _same_document_as_last(document_starts, width - 1).to(x.dtype)
    y = _CausalConv.apply(padded, weight, bias, document_starts, activation)
    return y, tail.transpose(1, 2).contiguous()


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, padded: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None, activation: bool
    ) -> Tensor:
        ctx.save_for_backward(padded, weight, bias, starts)
        ctx.activation = activation
        conv = _Convolution(padded, weight, bias, starts)
        y = padded.new_empty(padded.shape[0], conv.length, padded.shape[2])
        for rows, times in _blocks(y):
            total = conv(rows, times)
            y[rows, times] = F.silu(total, inplace=True) if activation else total
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        padded, weight, bias, starts = ctx.saved_tensors
        conv = _Convolution(padded, weight, bias, starts)
        dpadded = torch.empty_like(padded)
        dtaps, dbias = torch.zeros_like(conv.taps), torch.zeros_like(conv.taps[0])
        for rows, inputs in _blocks(padded):  # a block of inputs, and the tokens that read them
            times = slice(max(0, inputs.start - conv.width + 1), min(inputs.stop, conv.length))
            d = dy[rows, times].float()
            if ctx.activation:
                d = torch.ops.aten.silu_backward(d, conv(rows, times))
            dpadded[rows, inputs] = conv.transposed(d, rows, times, inputs)
            own = slice(min(inputs.start, conv.length), times.stop)  # each token counts in one block only
            conv.accumulate(d[:, own.start - times.start :], rows, own, dtaps, dbias)
        dweight = dtaps.t().to(weight.dtype)
        return dpadded, dweight, None if bias is None else dbias.to(bias.dtype), None, None


class _Convolution:
    """The convolution of the padded inputs (B, T + W - 1, C), evaluated a block at a time in fp32."""

    def __init__(self, padded: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None) -> None:
        self.padded, self.bias = padded, None if bias is None else bias.float()
        self.taps = weight.float().t().contiguous()  # (W, C)
        self.width = weight.shape[1]
        self.length = padded.shape[1] - self.width + 1
        self.visible = _visible(starts, self.width)

    def __call__(self, rows: slice, times: slice) -> Tensor:
        inputs = self.padded[rows, times.start : times.stop + self.width - 1].float()
        length = times.stop - times.start
        total = inputs[:, self.width - 1 :] * self.taps[-1]
        if self.bias is not None:
            total += self.bias
        for k in range(self.width - 1):
            total.addcmul_(self._masked(inputs[:, k : k + length], k, rows, times), self.taps[k])
        return total

    def transposed(self, d: Tensor, rows: slice, times: slice, inputs: slice) -> Tensor:
        """Gradient of the inputs in `inputs` from the gradient d of the sums in `times`."""
        length = inputs.stop - inputs.start
        before, after = times.start - (inputs.start - self.width + 1), inputs.stop - times.stop
        total = d.new_zeros(d.shape[0], length, d.shape[2])
        for k in range(self.width):
            masked = self._masked(d, k, rows, times)
            if before or after:
                masked = F.pad(masked, (0, 0, before, after))
            first = self.width - 1 - k
            total.addcmul_(masked[:, first : first + length], self.taps[k])
        return total

    def accumulate(self, d: Tensor, rows: slice, times: slice, dtaps: Tensor, dbias: Tensor) -> None:
        """Add the share of the tokens in `times` to the gradients of taps and bias."""
        inputs = self.padded[rows, times.start : times.stop + self.width - 1].float()
        dbias += d.sum((0, 1))
        for k in range(self.width):
            product = self._masked(d, k, rows, times) * inputs[:, k : k + d.shape[1]]
            dtaps[k] += product.sum((0, 1))

    def _masked(self, t: Tensor, k: int, rows: slice, times: slice) -> Tensor:
        mask = self.visible[k]
        return t if mask is None else t * mask[rows, times]


def _blocks(t: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut (B, T, C) into blocks of whole rows, or of one row's tokens where a row is too long."""
    batch, length, channels = t.shape
    tokens = max(1, BLOCK_ELEMENTS // channels)
    rows, times = max(1, tokens // length), min(tokens, length)
    for row in range(0, batch, rows):
        for time in range(0, length, times):
            yield slice(row, min(row + rows, batch)), slice(time, min(time + times, length))


def _visible(starts: Tensor | None, width: int) -> list[Tensor | None]:
    """For each tap k, (B, T, 1) fp32: 1 where the token W - 1 - k earlier belongs to the same document."""
    if starts is None:
        return [None] * width
    documents = F.pad(starts.int(), (width - 1, 0)).cumsum(1)
    now, length = documents[:, width - 1 :], starts.shape[1]
    return [(documents[:, k : k + length] == now)[..., None].float() for k in range(width - 1)] + [None]


def _same_document_as_last(starts: Tensor, count: int) -> Tensor:
    """(B, count, 1) bool: which of the last `count` inputs belong to the last token's document."""
    documents = F.pad(starts.int(), (count, 0)).cumsum(1)
    return (documents[:, -count:] == documents[:, -1:])[..., None]

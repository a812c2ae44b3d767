"""Causal depthwise convolution as a sum of shifted, scaled copies, with its own backward.

Written token-major, (B, T, C), as in_proj leaves it: no transposition, and a handful of streaming passes.
The convolution is recomputed in the backward pass, so only the input is kept.
"""

from typing import Any

import torch
from torch import Tensor


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
        total = _convolve(padded.float(), weight, bias, _visible(starts, weight.shape[1]))
        if activation:
            torch.nn.functional.silu(total, inplace=True)
        return total.to(padded.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        padded, weight, bias, starts = ctx.saved_tensors
        width, length = weight.shape[1], dy.shape[1]
        visible = _visible(starts, width)
        inputs, d = padded.float(), dy.float()
        if ctx.activation:
            d = torch.ops.aten.silu_backward(d, _convolve(inputs, weight, bias, visible))
        taps = weight.float().t()
        dpadded = torch.zeros_like(inputs)
        dweight = torch.empty_like(taps)
        for k in range(width):
            masked = d if visible[k] is None else d * visible[k]
            dpadded[:, k : k + length].addcmul_(masked, taps[k])
            dweight[k] = (masked * inputs[:, k : k + length]).sum((0, 1))
        dbias = None if bias is None else d.sum((0, 1)).to(bias.dtype)
        return dpadded.to(padded.dtype), dweight.t().to(weight.dtype), dbias, None, None


def _convolve(inputs: Tensor, weight: Tensor, bias: Tensor | None, visible: list[Tensor | None]) -> Tensor:
    taps = weight.float().t().contiguous()  # (W, C)
    width, length = taps.shape[0], inputs.shape[1] - taps.shape[0] + 1
    total = inputs[:, width - 1 :] * taps[width - 1]
    if bias is not None:
        total += bias.float()
    for k in range(width - 1):
        piece = inputs[:, k : k + length]
        mask = visible[k]
        total.addcmul_(piece if mask is None else piece * mask, taps[k])
    return total


def _visible(starts: Tensor | None, width: int) -> list[Tensor | None]:
    """For each tap k, (B, T, 1) fp32: 1 where the token W - 1 - k earlier belongs to the same document."""
    if starts is None:
        return [None] * width
    documents = torch.nn.functional.pad(starts.int(), (width - 1, 0)).cumsum(1)
    now, length = documents[:, width - 1 :], starts.shape[1]
    return [(documents[:, k : k + length] == now)[..., None].float() for k in range(width - 1)] + [None]


def _same_document_as_last(starts: Tensor, count: int) -> Tensor:
    """(B, count, 1) bool: which of the last `count` inputs belong to the last token's document."""
    documents = torch.nn.functional.pad(starts.int(), (count, 0)).cumsum(1)
    return (documents[:, -count:] == documents[:, -1:])[..., None]

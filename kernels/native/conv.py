"""The causal convolution's passes in C."""

import torch
from torch import Tensor

from kernels.native.build import call, rows, usable

MAX_WIDTH, SEGMENT = 16, 256  # as in conv.c


def takes(x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `forward` and `backward` can stand in for the PyTorch form."""
    return weight.shape[1] <= MAX_WIDTH and x.numel() > 0 and usable(x, before, weight, bias)


def forward(
    x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None, activation: bool
) -> Tensor:
    """x (B, T, C), before (B, W - 1, C), weight (C, W), bias (C,), starts (B, T) bool -> y (B, T, C)."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    inputs = _inputs(x, before, weight, bias, starts, activation)
    call("conv_forward", *inputs, y, None, None, None, None)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    before: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor | None,
    activation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, before, weight (C, W) and bias (C,), the last two in fp32."""
    dx, dbefore = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, before))
    batch, length, channels = x.shape
    segments, width = batch * -(-length // SEGMENT), weight.shape[1]
    partial = torch.empty(segments, width + 1, channels, dtype=torch.float32)
    inputs = _inputs(x, before, weight, bias, starts, activation)
    call("conv_backward", *inputs, None, rows(dy), dx, dbefore, partial)
    sums = partial.sum(0)
    return dx, dbefore, sums[:width].t(), sums[width]


def _inputs(
    x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None, activation: bool
) -> tuple[Tensor | int | None, ...]:
    starts = None if starts is None else starts.contiguous()
    sizes = (*x.shape, weight.shape[1], int(activation))
    return (*sizes, rows(x), rows(before), rows(weight), None if bias is None else rows(bias), starts)

"""The norms' passes in C."""

import torch
from torch import Tensor

from kernels.native.build import call, rows

TOKENS = 16  # as in norm.c


def forward(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    n_groups: int,
    norm_before_gate: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x, z (..., C), weight (C,) -> y (..., C) in `dtype`, inverse root mean squares (..., n_groups)."""
    y = torch.empty(x.shape, dtype=dtype)
    inverse = torch.empty(*x.shape[:-1], n_groups, dtype=torch.float32)
    sizes = (x.numel() // x.shape[-1], x.shape[-1], n_groups, int(norm_before_gate), eps)
    inputs = (_tokens(x), _tokens(z), rows(weight), inverse)
    call("norm_forward", *sizes, *inputs, _tokens(y), None, None, None, None)
    return y, inverse


def backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, inverse: Tensor, norm_before_gate: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x, z, and of weight in fp32."""
    tokens, channels = x.numel() // x.shape[-1], x.shape[-1]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dz = None if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    partial = torch.empty(-(-tokens // TOKENS), channels, dtype=torch.float32)
    sizes = (tokens, channels, inverse.shape[-1], int(norm_before_gate), 0.0)
    inputs = (_tokens(x), _tokens(z), rows(weight), inverse)
    call("norm_backward", *sizes, *inputs, None, _tokens(dy), _tokens(dx), _tokens(dz), partial)
    return dx, dz, partial.sum(0)


def _tokens(t: Tensor | None) -> Tensor | None:
    """(..., C) -> (tokens, C), a view where the strides allow one."""
    return None if t is None else rows(t.flatten(0, -2) if t.dim() > 1 else t[None])

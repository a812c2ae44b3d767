"""Gated RMSNorm in fp32 with its own backward, which recomputes everything but the inputs.

In blocks of tokens that stay in the cache, so that its many cheap passes do not go to memory.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of one block: 1 MiB in fp32, measured best of 2^15 to 2^22.
BLOCK_ELEMENTS = 2**18


def gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, *, eps: float, n_groups: int = 1, norm_before_gate: bool = False
) -> Tensor:
    """RMSNorm(x * silu(z)), or RMSNorm(x) * silu(z) with `norm_before_gate` (arXiv 2405.21060, section 7).

    The mean square runs over each of `n_groups` equal parts of the channels.

    Args:
        x, z: (..., C). weight: (C,). eps: added to the mean square. n_groups: divides C.

    Returns:
        (..., C) in x's dtype; computed in fp32.
    """
    if weight.shape[0] % n_groups or x.shape != z.shape or x.shape[-1:] != weight.shape:
        shapes = f"{tuple(x.shape)}, {tuple(z.shape)}, {tuple(weight.shape)}"
        raise ValueError(f"x, z, weight have shapes {shapes}, n_groups={n_groups}: expected (..., C), (..., C), (C,)")
    return _GatedRMSNorm.apply(x, z, weight, eps, n_groups, norm_before_gate)  # type: ignore[no-any-return]


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor, weight: Tensor, eps: float, n_groups: int, norm_before_gate: bool
    ) -> Tensor:
        ctx.save_for_backward(x, z, weight)
        ctx.options = (eps, n_groups, norm_before_gate)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for x_block, z_block, y_block in _blocks(x, z, y):
            gate = F.silu(z_block.float())
            if norm_before_gate:
                normal, _ = _normalise(x_block.float(), eps, n_groups)
                y_block.copy_(normal.mul_(weight).mul_(gate))
            else:
                normal, _ = _normalise(gate.mul_(x_block), eps, n_groups)
                y_block.copy_(normal.mul_(weight))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight = ctx.saved_tensors
        eps, n_groups, norm_before_gate = ctx.options
        dx, dz = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, z))
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        for x_block, z_block, d, dx_block, dz_block in _blocks(x, z, dy, dx, dz):
            x32, z32, d = x_block.float(), z_block.float(), d.float()
            gate = F.silu(z32)
            if norm_before_gate:
                normal, inverse = _normalise(x32, eps, n_groups)
                dgate = d * normal * weight
                d = d * gate
                dx_block.copy_(_normalise_backward(d * weight, normal, inverse))
            else:
                normal, inverse = _normalise(x32 * gate, eps, n_groups)
                dgated = _normalise_backward(d * weight, normal, inverse)
                dgate = dgated * x32
                dx_block.copy_(dgated.mul_(gate))
            dweight += (d * normal).sum(0)
            dz_block.copy_(torch.ops.aten.silu_backward(dgate, z32))
        return dx, dz, dweight.to(weight.dtype), None, None, None


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same tokens of every tensor, (tokens, C), small enough to stay in the cache."""
    flat = [t.flatten(0, -2) for t in tensors]
    return zip(*(t.split(max(1, BLOCK_ELEMENTS // t.shape[1])) for t in flat), strict=True)


def _normalise(u: Tensor, eps: float, n_groups: int) -> tuple[Tensor, Tensor]:
    """u over its root mean square, and the inverse root mean square (..., n_groups, 1)."""
    grouped = u.unflatten(-1, (n_groups, -1))
    # the norm reduces without a temporary of u's size
    mean_square = torch.linalg.vector_norm(grouped, dim=-1, keepdim=True).square() / grouped.shape[-1]
    inverse = (mean_square + eps).rsqrt()
    return (grouped * inverse).flatten(-2), inverse


def _normalise_backward(d: Tensor, normal: Tensor, inverse: Tensor) -> Tensor:
    grouped, unit = d.unflatten(-1, inverse.shape[-2:-1] + (-1,)), normal.unflatten(-1, inverse.shape[-2:-1] + (-1,))
    along = (grouped * unit).mean(-1, keepdim=True)
    return torch.addcmul(grouped, unit, along, value=-1).mul_(inverse).flatten(-2)

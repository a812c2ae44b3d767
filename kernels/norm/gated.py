"""Gated RMSNorm in fp32 with its own backward, which recomputes everything but the inputs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
        ctx.eps, ctx.n_groups, ctx.norm_before_gate = eps, n_groups, norm_before_gate
        gate = F.silu(z.float())
        if norm_before_gate:
            normal, _ = _normalise(x.float(), eps, n_groups)
            return normal.mul_(weight).mul_(gate).to(x.dtype)
        normal, _ = _normalise(gate.mul_(x), eps, n_groups)
        return normal.mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight = ctx.saved_tensors
        gate, dy, x32, z32 = F.silu(z.float()), dy.float(), x.float(), z.float()
        if ctx.norm_before_gate:
            normal, inverse = _normalise(x32, ctx.eps, ctx.n_groups)
            dscaled = dy * gate
            dgate = dy * normal * weight
            dx = _normalise_backward(dscaled * weight, normal, inverse)
        else:
            normal, inverse = _normalise(x32 * gate, ctx.eps, ctx.n_groups)
            dscaled = dy
            dgated = _normalise_backward(dy * weight, normal, inverse)
            dgate = dgated * x32
            dx = dgated.mul_(gate)
        dweight = (dscaled * normal).flatten(0, -2).sum(0)
        dz = torch.ops.aten.silu_backward(dgate, z32)
        return dx.to(x.dtype), dz.to(z.dtype), dweight.to(weight.dtype), None, None, None


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

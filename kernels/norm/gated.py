"""Gated RMSNorm in fp32 with its own backward: the inputs and the inverse root mean squares are kept."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.native import build
from kernels.native import norm as native
from kernels.norm.rms import normalise, normalise_backward, scale_groups, token_blocks, token_scales


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    eps: float,
    n_groups: int = 1,
    norm_before_gate: bool = False,
    backend: Literal["torch", "triton"] | None = None,
) -> Tensor:
    """RMSNorm(x * silu(z)), or RMSNorm(x) * silu(z) with `norm_before_gate` (arXiv 2405.21060, section 7).

    The mean square runs over each of `n_groups` equal parts of the channels.

    Args:
        x, z: (..., C). weight: (C,). eps: added to the mean square. n_groups: divides C.
        backend: None for Triton kernels on a GPU, PyTorch elsewhere.

    Returns:
        (..., C) in x's dtype; computed in fp32.
    """
    if weight.shape[0] % n_groups or x.shape != z.shape or x.shape[-1:] != weight.shape:
        shapes = f"{tuple(x.shape)}, {tuple(z.shape)}, {tuple(weight.shape)}"
        raise ValueError(
            f"x, z, weight have shapes {shapes}, n_groups={n_groups}: expected (..., C), (..., C), (C,)"
        )
    if (backend or ("triton" if x.is_cuda else "torch")) == "triton":
        from kernels.norm.triton_norm import triton_rms_norm  # imports triton

        return triton_rms_norm(x, z, weight, eps, n_groups, norm_before_gate, x.dtype)
    return _GatedRMSNorm.apply(x, z, weight, eps, n_groups, norm_before_gate)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor, weight: Tensor, eps: float, n_groups: int, norm_before_gate: bool
    ) -> Tensor:
        ctx.norm_before_gate = norm_before_gate
        if build.usable(x, z, weight):
            y, inverse = native.forward(x, z, weight, eps, n_groups, norm_before_gate, x.dtype)
            ctx.save_for_backward(x, z, weight, inverse)
            return y
        y, inverse = torch.empty_like(x, memory_format=torch.contiguous_format), token_scales(x, n_groups)
        for x_block, z_block, inverse_block, y_block in token_blocks(x, z, inverse, y):
            gate = F.silu(z_block.float())
            if norm_before_gate:
                normal = normalise(x_block.float(), inverse_block, eps)
                torch.mul(normal.mul_(weight), gate, out=y_block)
            else:
                normal = normalise(gate.mul_(x_block), inverse_block, eps)
                torch.mul(normal, weight, out=y_block)
        ctx.save_for_backward(x, z, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight, inverse = ctx.saved_tensors
        if build.usable(x, z, weight, dy):
            dx, dz, dweight = native.backward(dy, x, z, weight, inverse, ctx.norm_before_gate)
            return dx, dz, dweight.to(weight.dtype), None, None, None
        dx, dz = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, z))
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        for x_block, z_block, scale, d, dx_block, dz_block in token_blocks(x, z, inverse, dy, dx, dz):
            x32, z32, d = x_block.float(), z_block.float(), d.float()
            gate = F.silu(z32)
            if ctx.norm_before_gate:
                normal = scale_groups(x32, scale)
                dgate = (d * normal).mul_(weight)
                dx_block.copy_(normalise_backward(d * gate, weight, normal, scale, dweight))
            else:
                dgated = normalise_backward(d, weight, scale_groups(x32 * gate, scale), scale, dweight)
                dgate = dgated * x32
                torch.mul(dgated, gate, out=dx_block)
            dz_block.copy_(torch.ops.aten.silu_backward(dgate, z32))
        return dx, dz, dweight.to(weight.dtype), None, None, None

"""RMSNorm with its own backward, and the pieces that the gated norm shares with it.

Computed in fp32, in blocks of tokens that stay near the cache, so that the many cheap passes do not go to
memory. For the backward pass the inputs and one number a token and group are kept.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.native import build
from kernels.native import norm as native

# Elements of one block: 1 MiB in fp32, measured best of 2^15 to 2^22.
BLOCK_ELEMENTS = 2**18


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    dtype: torch.dtype | None = None,
    backend: Literal["torch", "triton"] | None = None,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32.

    Args:
        x: (..., C). weight: (C,). eps: added to the mean square. dtype: of the result; None for x's.
        backend: None for Triton kernels on a GPU, PyTorch elsewhere.

    Returns:
        (..., C) in `dtype`.

    Raises:
        ValueError: if the channels of x and weight differ.
    """
    if x.shape[-1:] != weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected ({x.shape[-1]},)")
    if (backend or ("triton" if x.is_cuda else "torch")) == "triton":
        from kernels.norm.triton_norm import triton_rms_norm  # imports triton

        return triton_rms_norm(x, None, weight, eps, 1, False, dtype or x.dtype)
    return _RMSNorm.apply(x, weight, eps, dtype or x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        if build.usable(x, weight) and dtype in build.DTYPES:
            y, inverse = native.forward(x, None, weight, eps, 1, False, dtype)
            ctx.save_for_backward(x, weight, inverse)
            return y
        y, inverse = torch.empty(x.shape, dtype=dtype, device=x.device), token_scales(x, 1)
        for x_block, inverse_block, y_block in token_blocks(x, inverse, y):
            normal = normalise(x_block.float(), inverse_block, eps)
            torch.mul(normal, weight, out=y_block)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        if build.usable(x, weight, dy):
            dx, _, dweight = native.backward(dy, x, None, weight, inverse, False)
            return dx, dweight.to(weight.dtype), None, None
        dx, dweight = (
            torch.empty_like(x, memory_format=torch.contiguous_format),
            torch.zeros_like(weight, dtype=torch.float32),
        )
        for x_block, inverse_block, d, dx_block in token_blocks(x, inverse, dy, dx):
            normal = scale_groups(x_block.float(), inverse_block)
            dx_block.copy_(normalise_backward(d.float(), weight, normal, inverse_block, dweight))
        return dx, dweight.to(weight.dtype), None, None


def token_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same tokens of every tensor (..., C or n_groups), small enough to stay near the cache."""
    flat = [t.flatten(0, -2) for t in tensors]
    return zip(*(t.split(max(1, BLOCK_ELEMENTS // flat[0].shape[1])) for t in flat), strict=True)


def token_scales(x: Tensor, n_groups: int) -> Tensor:
    """Room for the inverse root mean square of every token and group: (..., n_groups) fp32."""
    return torch.empty(*x.shape[:-1], n_groups, dtype=torch.float32, device=x.device)


def normalise(u: Tensor, inverse: Tensor, eps: float) -> Tensor:
    """u (tokens, C) over its root mean square in each group, whose inverse (tokens, n_groups) is written."""
    grouped = u.unflatten(1, (inverse.shape[1], -1))
    # the norm reduces without a temporary of u's size
    mean_square = torch.linalg.vector_norm(grouped, dim=2).square_() / grouped.shape[2]
    torch.rsqrt(mean_square + eps, out=inverse)
    return scale_groups(u, inverse)


def scale_groups(u: Tensor, scale: Tensor) -> Tensor:
    """u (tokens, C) times scale (tokens, n_groups) in each group."""
    return (u.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]).flatten(1)


def normalise_backward(d: Tensor, weight: Tensor, normal: Tensor, inverse: Tensor, dweight: Tensor) -> Tensor:
    """Gradient of u through `normal * weight`, from its gradient d (tokens, C); adds to dweight (C,)."""
    groups = (inverse.shape[1], -1)
    along = d * normal
    dweight += along.sum(0)
    along = torch.einsum("tgc,gc->tg", along.unflatten(1, groups), weight.float().view(groups))
    along = along.div_(d.shape[1] // groups[0])[:, :, None]
    dnormal = torch.mul(d, weight).unflatten(1, groups)
    return dnormal.addcmul_(normal.unflatten(1, groups), along, value=-1).mul_(inverse[:, :, None]).flatten(1)

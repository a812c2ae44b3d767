"""The residual stream's addition and the RMSNorm that reads the sum, as one function."""

from typing import Literal

import torch
from torch import Tensor

from kernels.norm.rms import rms_norm


def add_rms_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    *,
    eps: float,
    dtype: torch.dtype | None = None,
    backend: Literal["torch", "triton"] | None = None,
) -> tuple[Tensor, Tensor]:
    """residual + branch, and its RMSNorm over the last dimension, computed in fp32.

    Args:
        residual, branch: (..., C), the branch in a dtype that adding does not widen the residual's.
        weight: (C,). eps: added to the mean square. dtype: of the norm; None for the residual's.
        backend: None for one Triton kernel on a GPU, PyTorch elsewhere.

    Returns:
        The sum (..., C) in the residual's dtype; its norm (..., C) in `dtype`.

    Raises:
        ValueError: if shapes differ, or the sum would not be of the residual's dtype.
    """
    if residual.shape != branch.shape or residual.shape[-1:] != weight.shape:
        shapes = f"{tuple(residual.shape)}, {tuple(branch.shape)}, {tuple(weight.shape)}"
        raise ValueError(f"residual, branch, weight have shapes {shapes}: expected (..., C), (..., C), (C,)")
    if torch.promote_types(residual.dtype, branch.dtype) != residual.dtype:
        raise ValueError(f"branch is {branch.dtype}: must not be wider than the residual, {residual.dtype}")
    if (backend or ("triton" if residual.is_cuda else "torch")) == "triton":
        from kernels.norm.triton_add import triton_add_rms_norm  # imports triton

        return triton_add_rms_norm(residual, branch, weight, eps, dtype or residual.dtype)
    total = residual + branch
    return total, rms_norm(total, weight, eps=eps, dtype=dtype, backend="torch")

"""Addition and RMSNorm on the Triton kernels of the norm as one operator, `longstate::add_rms_norm`."""

from typing import Any

import torch
from torch import Tensor

from kernels.norm.triton_norm import launch_backward, launch_forward, require_dtypes


def triton_add_rms_norm(
    residual: Tensor, branch: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `kernels.norm.add_rms_norm`; the norm in `dtype`."""
    require_dtypes(residual=residual.dtype, branch=branch.dtype, dtype=dtype)
    total, y, _ = _forward(residual, branch, weight, eps, dtype)
    return total, y


@torch.library.custom_op("longstate::add_rms_norm", mutates_args=())
def _forward(
    residual: Tensor, branch: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, its norm, and the inverse root mean square of every token (..., 1) fp32."""
    total = _packed(residual, residual.dtype)
    y, inverse = launch_forward(residual, None, weight, eps, 1, False, dtype, branch=branch, total=total)
    return total, y, inverse


@_forward.register_fake
def _(
    residual: Tensor, branch: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    inverse = residual.new_empty(*residual.shape[:-1], 1, dtype=torch.float32)
    return _packed(residual, residual.dtype), _packed(residual, dtype), inverse


@torch.library.custom_op("longstate::add_rms_norm_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    inverse: Tensor,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of residual, branch (empty where it is the residual's) and weight."""
    dbranch = _gradient_of_branch(total, branch_dtype)
    second = dbranch if branch_dtype != total.dtype else None
    dx, _, dweight = launch_backward(
        dy, total, None, weight, inverse, 1, False, dtotal=dtotal, dbranch=second
    )
    return dx, dbranch, dweight


@_backward.register_fake
def _(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    inverse: Tensor,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=total.device)
    return _packed(total, total.dtype), _gradient_of_branch(total, branch_dtype), dweight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, branch, weight, _, _ = inputs
    total, _, inverse = output
    ctx.branch_dtype = branch.dtype
    ctx.mark_non_differentiable(inverse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, weight, inverse)


def _gradients(ctx: Any, dtotal: Tensor | None, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    """Either output's gradient may be absent: nothing reads the sum behind the last norm."""
    if dy is None:
        return dtotal, None if dtotal is None else dtotal.to(ctx.branch_dtype), None, None, None
    total, weight, inverse = ctx.saved_tensors
    dx, dbranch, dweight = _backward(dy, dtotal, total, weight, inverse, ctx.branch_dtype)
    return dx, dx if ctx.branch_dtype == dx.dtype else dbranch, dweight, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _gradient_of_branch(total: Tensor, dtype: torch.dtype) -> Tensor:
    return total.new_empty(0) if dtype == total.dtype else _packed(total, dtype)


def _packed(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(like.shape, dtype=dtype, device=like.device)

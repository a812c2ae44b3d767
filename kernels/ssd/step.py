"""One token of the recurrence for every row, the state updated in place: what generation repeats."""

import math
from typing import Literal

import torch
from torch import Tensor

from kernels.arguments import require_device, require_shape
from kernels.ssd.checks import require_heads
from kernels.ssd.discretize import discretize
from kernels.ssd.heads import spread
from kernels.ssd.mitigation import FACTORS, NONE, Mitigation

POINTWISE = (*FACTORS, "threshold")


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
    mitigation: Mitigation | None = None,
    active: Tensor | None = None,
    backend: Literal["torch", "triton"] | None = None,
) -> Tensor:
    """`kernels.ssd.ssd_scan` of one token, without gradients.

        state <- alpha_scale * exp(dt A) state + insert_scale * dt * x B^T        y = state C + D x

    Args:
        state: (B, H, P, N) fp32, changed in place; N contiguous.
        x: (B, H, P), fp32, bf16 or fp16. dt: (B, H). A: (H,), negative. B, C: (B, G, N), G divides H.
        D: (H,) or (H, P). dt_bias: (H,). dt_softplus, dt_limit: as in `ssd_scan`.
        mitigation: factors or a token_filter; those composed of several scans need `ssd_scan`.
        active: (B,) bool; the state of other rows stays as it is, their y is zero.
        backend: None for a Triton kernel on a GPU, PyTorch elsewhere.

    Returns:
        y (B, H, P) in x's dtype.

    Raises:
        ValueError: for arguments that do not fit, or that record gradients.
    """
    mitigation = mitigation or NONE
    tensors = {"state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias}
    tensors |= {f: v for f in POINTWISE if isinstance(v := getattr(mitigation, f), Tensor)}
    _check(tensors | {"active": active}, mitigation)
    mitigation = spread(mitigation, state.shape[1], state.device)
    if (backend or ("triton" if x.is_cuda else "torch")) == "triton":
        from kernels.ssd.triton_step import triton_step  # imports triton

        values = [0.0 if (v := getattr(mitigation, name)) is None else v for name in POINTWISE]
        per_head = [value for value in values if isinstance(value, Tensor)]
        scales = [math.nan if isinstance(value, Tensor) else float(value) for value in values]
        limit = [] if dt_limit is None else list(dt_limit)
        return triton_step(
            state, x, dt, A, B, C, D, dt_bias, dt_softplus, limit, per_head, scales, active
        )  # fmt: skip
    if active is not None:
        rows = active.nonzero()[:, 0]
        some = state[rows]
        y = torch.zeros_like(x)
        y[rows] = _step(
            some, x[rows], dt[rows], A, B[rows], C[rows], D, dt_bias, dt_softplus, dt_limit, mitigation
        )
        state[rows] = some
        return y
    return _step(state, x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, mitigation)


def _step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float] | None,
    mitigation: Mitigation,
) -> Tensor:
    log_decay, insert = discretize(dt[:, None], A.float(), dt_bias, dt_softplus, dt_limit, mitigation)
    x32, repeats = x.float(), x.shape[1] // B.shape[1]
    B32, C32 = (m.float().repeat_interleave(repeats, dim=1) for m in (B, C))
    state *= log_decay[:, 0].exp()[:, :, None, None]
    state.addcmul_((insert[:, 0, :, None] * x32)[..., None], B32[:, :, None])
    y = (state @ C32[..., None])[..., 0]
    if D is not None:
        y = y + x32 * (D if D.dim() == 2 else D[:, None])
    return y.to(x.dtype)


def _check(tensors: dict[str, Tensor | None], mitigation: Mitigation) -> None:
    if mitigation.composed:
        raise ValueError(f"mitigation={mitigation.key}: of several scans; use ssd_scan with T = 1")
    recording = [name for name, t in tensors.items() if t is not None and t.requires_grad]
    if recording and torch.is_grad_enabled():
        raise ValueError(f"{recording[0]} records gradients: use ssd_scan with T = 1, or torch.no_grad()")
    state, x, B = tensors["state"], tensors["x"], tensors["B"]
    assert state is not None
    assert x is not None
    assert B is not None
    if state.dim() != 4 or state.dtype != torch.float32 or state.stride(3) != 1:
        given = f"{state.dtype} of shape {tuple(state.shape)} and strides {state.stride()}"
        raise ValueError(f"state is {given}: expected float32 (B, H, P, N), N contiguous")
    batch, heads, headdim, d_state = state.shape
    require_heads(mitigation, heads)
    if B.dim() != 3 or heads % B.shape[1]:
        raise ValueError(
            f"B has shape {tuple(B.shape)}: expected (B, G, N) with G dividing the {heads} heads"
        )
    groups = (batch, B.shape[1], d_state)
    expected: dict[str, tuple[tuple[int, ...], ...]] = {}
    expected |= {"x": ((batch, heads, headdim),), "dt": ((batch, heads),), "B": (groups,), "C": (groups,)}
    expected |= {"D": ((heads,), (heads, headdim)), "active": ((batch,),)}
    for name, tensor in tensors.items():
        shapes = expected.get(name, (tuple(state.shape) if name == "state" else (heads,),))
        if tensor is not None:
            require_shape(name, tensor, shapes)
            require_device(name, tensor, x)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}: expected float32, bfloat16 or float16")

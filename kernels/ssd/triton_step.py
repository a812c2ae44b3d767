"""One token of the recurrence on a GPU, the state updated where it lies: `longstate::ssd_step`."""

# mypy: allow-incomplete-defs
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_support import on_device, softplus
from kernels.tuning import Config, bucket, pick

# TILE: numbers of state a program; 8 to 32 a thread, in loads of 16 bytes.
CONFIGS = (
    Config(num_warps=8, meta={"TILE": 2048}),
    Config(num_warps=4, meta={"TILE": 2048}),
    Config(num_warps=2, meta={"TILE": 1024}),
)


@triton.jit
def _factor(per_head, value, head):
    """A setting of the mitigation: one value a head, or the same for all."""
    if per_head is None:
        return value
    else:
        return tl.load(per_head + head).to(tl.float32)


@triton.jit
def step_kernel(
    state, x, dt, A, B, C, D, dt_bias, active,
    alpha_scale, insert_scale, delta_scale, decay_scale, threshold, y,
    stride_s_b, stride_s_h, stride_s_p, stride_x_b, stride_x_h, stride_dt_b, stride_dt_h,
    stride_B_b, stride_B_g, stride_C_b, stride_C_g, stride_D_h, stride_D_p,
    log_alpha, insert, delta, decay, least, low, high, H, P, N, heads_per_group,
    SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of P, fastest, of every head of every row. Rows not active read and change no state."""
    tiles = tl.cdiv(P, BLOCK_P)
    head = ((tl.program_id(0) // tiles) % H).to(tl.int64)
    batch = (tl.program_id(0) // tiles // H).to(tl.int64)
    p, n = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    mask_p, mask_n = p < P, n < N
    known_p = mask_p
    if active is not None:
        known_p = known_p & (tl.load(active + batch) != 0)
    known = known_p[:, None] & mask_n[None, :]
    place = state + batch * stride_s_b + head * stride_s_h + p[:, None] * stride_s_p + n[None, :]
    h = tl.load(place, mask=known, other=0.0)
    group = head // heads_per_group
    b = tl.load(B + batch * stride_B_b + group * stride_B_g + n, mask=mask_n, other=0.0).to(tl.float32)
    c = tl.load(C + batch * stride_C_b + group * stride_C_g + n, mask=mask_n, other=0.0).to(tl.float32)
    u = tl.load(x + batch * stride_x_b + head * stride_x_h + p, mask=known_p, other=0.0).to(tl.float32)

    step = tl.load(dt + batch * stride_dt_b + head * stride_dt_h).to(tl.float32)
    if dt_bias is not None:
        step += tl.load(dt_bias + head).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    if LIMIT:
        step = tl.minimum(tl.maximum(step, low), high)
    step *= _factor(delta_scale, delta, head)
    step = tl.where(step < _factor(threshold, least, head), 0.0, step)
    a = step * (tl.load(A + head).to(tl.float32) * _factor(decay_scale, decay, head))
    if alpha_scale is None:
        a += log_alpha
    else:  # in float64: a thousandth of what 0.9999 forgets is lost when its logarithm is taken in fp32
        a += tl.log(tl.load(alpha_scale + head).to(tl.float64)).to(tl.float32)
    # e^a near 1 in fp32 is off by up to 2^-22, at every token alike, which a million tokens add up. There the
    # state keeps itself, and what it loses, a series, is rounded with the state: at random.
    slow = tl.abs(a) < 0.125
    lost = a * (1.0 + a / 2 * (1.0 + a / 3 * (1.0 + a / 4 * (1.0 + a / 5))))
    whole, part = tl.where(slow, 1.0, 0.0), tl.where(slow, lost, tl.exp(a))
    inserted = (step * _factor(insert_scale, insert, head)) * u
    h = h * whole + (h * part + inserted[:, None] * b[None, :])
    tl.store(place, h, mask=known)
    out = tl.sum(tl.where(known, h * c[None, :], 0.0), 1)
    if D is not None:
        out += u * tl.load(D + head * stride_D_h + p * stride_D_p, mask=mask_p, other=0.0).to(tl.float32)
    tl.store(y + (batch * H + head) * P + p, out.to(y.dtype.element_ty), mask=mask_p)


@torch.library.custom_op("longstate::ssd_step", mutates_args=("state",))
def triton_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: list[float],
    per_head: list[Tensor],
    scales: list[float],
    active: Tensor | None,
) -> Tensor:
    """As `kernels.ssd.step.ssd_step`. dt_limit: (low, high) or empty. scales: alpha, insert, delta, decay and
    the threshold, nan where the next of the (H,) tensors `per_head` takes their place."""
    (batch, heads, headdim), d_state = x.shape, state.shape[3]
    key = {"P": headdim, "N": d_state, "rows": bucket(batch * heads)}
    settings = pick("ssd_step", CONFIGS, **key).settings()
    block_n = triton.next_power_of_2(d_state)
    block_p = max(1, min(settings.pop("TILE") // block_n, triton.next_power_of_2(headdim)))
    tensors = iter(per_head)
    factors = [next(tensors).contiguous() if math.isnan(scale) else None for scale in scales]
    alpha, *others = scales
    x, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, B, C))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with on_device(x):
        step_kernel[(batch * heads * triton.cdiv(headdim, block_p),)](
            state, x, dt, A.contiguous(), B, C, D, None if dt_bias is None else dt_bias.contiguous(),
            None if active is None else active.contiguous().view(torch.uint8), *factors, y,
            *state.stride()[:3], *x.stride()[:2], *dt.stride(), *B.stride()[:2], *C.stride()[:2],
            *_strides(D), math.log(alpha), *others, *(dt_limit or (0.0, 0.0)),
            heads, headdim, d_state, heads // B.shape[1],
            SOFTPLUS=dt_softplus, LIMIT=bool(dt_limit), BLOCK_P=block_p, BLOCK_N=block_n, **settings,
        )  # fmt: skip
    return y


@triton_step.register_fake
def _(state: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _strides(D: Tensor | None) -> tuple[int, int]:
    """Of (H,), (H, P) or none."""
    if D is None:
        return 0, 0
    return (D.stride(0), 0) if D.dim() == 1 else (D.stride(0), D.stride(1))

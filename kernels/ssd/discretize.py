"""dt -> (log decay, insertion weight): the pointwise part of the scan, shared by every backend."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ssd.mitigation import Mitigation


def discretize(
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float] | None,
    mitigation: Mitigation,
) -> tuple[Tensor, Tensor]:
    """Return log_decay and insert, both (B, T, H), in the dtype of A (fp32, or fp64 in the oracle).

    log_decay = log(alpha_scale) + dt' * decay_scale * A and insert = insert_scale * dt', with dt' as in
    `kernels.ssd.mitigation`. A retention near 1 is a log decay near 0: nothing is lost to rounding.
    """
    dt = dt.to(A.dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(A.dtype)
    if dt_softplus:
        dt = F.softplus(dt, threshold=50.0)  # PyTorch's default cuts over at 20, where fp64 still sees log1p
    if dt_limit is not None and tuple(dt_limit) != (0.0, float("inf")):
        dt = dt.clamp(*dt_limit)
    m = mitigation
    dt = _times(dt, m.delta_scale)
    if m.threshold is not None:
        threshold = m.threshold.to(dt) if isinstance(m.threshold, Tensor) else m.threshold
        dt = torch.where(dt < threshold, 0.0, dt)
    log_decay = dt * _times(A, m.decay_scale)
    log_alpha = _log_alpha(A, m)
    if log_alpha is not None:
        log_decay = log_decay + log_alpha
    return log_decay, _times(dt, m.insert_scale)


def per_head_factors(A: Tensor, mitigation: Mitigation) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(rate, log_alpha, weight), (H,) fp32: what a kernel that discretises by itself needs.

    log_decay = log_alpha + rate * base and insert = weight * base, with `base` the clamped softplus of dt.
    None for a log_alpha of 0 and a weight of 1.
    """
    m, A = mitigation, A.float()
    weight = _times(_times(torch.ones_like(A), m.delta_scale), m.insert_scale)
    unscaled = all(isinstance(f, float) and f == 1.0 for f in (m.delta_scale, m.insert_scale))
    return _times(_times(A, m.decay_scale), m.delta_scale), _log_alpha(A, m), None if unscaled else weight


def _log_alpha(A: Tensor, m: Mitigation) -> Tensor | None:
    """log(alpha_scale) (H,), in A's dtype; None for 0."""
    # 0.9999 in fp32 is off by 3e-8, a three-thousandth of what it forgets: take the logarithm in float64
    if isinstance(m.alpha_scale, Tensor):
        return m.alpha_scale.to(A.device, torch.float64).log().to(A.dtype).expand_as(A)
    return None if m.alpha_scale == 1.0 else torch.full_like(A, math.log(m.alpha_scale))


def _times(value: Tensor, factor: float | Tensor) -> Tensor:
    if isinstance(factor, Tensor):
        return value * factor.to(value)
    return value if factor == 1.0 else value * factor

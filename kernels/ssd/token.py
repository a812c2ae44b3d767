"""One token of every row under any mitigation, the state changed where it lies."""

from typing import Any

import torch
from torch import Tensor

from kernels.ssd.heads import head_mask, spread
from kernels.ssd.mitigation import NONE, Mitigation
from kernels.ssd.operators import clip
from kernels.ssd.scan import ssd_scan
from kernels.ssd.step import ssd_step
from kernels.ssd.window import State, Window


def ssd_token(
    state: State,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    mitigation: Mitigation | None = None,
    position: Tensor | None = None,
    active: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`ssd_step` under every mitigation, without asking the device: a CUDA graph can hold it.

    Args:
        state: (B, H, P, N) fp32, under sliding_window a `Window`; after the token it holds the next one.
        x, dt, A, B, C, D, options: as in `ssd_step`.
        position: (B,) int64, tokens since the row's document began; None for 0. state_norm and hard_reset
            read it.
        active: (B,) bool; the state of other rows stays as it is, bit for bit, their y means nothing.

    Returns:
        y (B, H, P) in x's dtype.
    """
    mitigation = mitigation or NONE
    if isinstance(state, Window):
        x, dt, B, C = (t[:, None] for t in (x, dt, B, C))
        y, after = ssd_scan(x, dt, A, B, C, D=D, initial_state=state, mitigation=mitigation, **options)
        for old, new in zip(state, after, strict=True):
            old.copy_(new if active is None else torch.where(_rows(active, new), new, old))
        return y[:, 0]
    rule, every = spread(mitigation, state.shape[1], state.device), mitigation.every
    if every is None:
        return ssd_step(state, x, dt, A, B, C, D=D, mitigation=mitigation, active=active, **options)
    if position is None:
        position = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    if rule.max_norm is None:  # hard_reset
        due = (position > 0) & (position % every == 0)
        due = (due if active is None else due & active)[:, None]
        if rule.heads is not None:
            due = due & head_mask(rule.heads, state.shape[1], state.device)
        state.masked_fill_(due[..., None, None], 0.0)
        return ssd_step(state, x, dt, A, B, C, D=D, active=active, **options)
    # state_norm: y reads the state before it is clipped; with every = 1 after, and D x stays as it is
    y = ssd_step(state, x, dt, A, B, C, D=D if every > 1 else None, active=active, **options)
    due = (position + 1) % every == 0
    scale = clip(state, rule.max_norm, due if active is None else due & active)
    state *= scale[..., None, None]
    if every == 1:
        y = y * scale[..., None].to(y.dtype)
        y = y if D is None else y + x * D.to(x.dtype).view(x.shape[1], -1)
    return y


def _rows(active: Tensor, like: Tensor) -> Tensor:
    return active.view(-1, *(1,) * (like.dim() - 1))

"""The oracle: the recurrence as written, one token at a time, in float64. Serial on purpose; O(T) steps."""

from typing import Any

import torch
from torch import Tensor

from kernels.ssd.core import Tokens
from kernels.ssd.mitigation import NONE, Mitigation
from kernels.ssd.window import last_window, with_past


def naive_scan(
    x: Tensor,
    log_decay: Tensor,
    insert: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    document_starts: Tensor | None,
    chunk_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """Arguments as `kernels.ssd.chunked.chunked_scan`; gradients by autograd. `chunk_size` plays no part."""
    tokens = Tokens(x, log_decay, insert, B, C)
    return oracle(tokens, D, initial_state, document_starts, None, NONE, None)[:2]


def oracle(
    tokens: Tokens,
    D: Tensor | None,
    initial_state: Any,
    document_starts: Tensor | None,
    position: Tensor | None,
    mitigation: Mitigation,
    states_every: int | None,
) -> tuple[Tensor, Any, Tensor | None]:
    """Arguments and results as `kernels.ssd.operators.composed_scan`."""
    rule, every, past = mitigation, mitigation.every or 1, 0
    if rule.window is not None:  # the window's tokens are read again: h sums what each of the last r inserted
        past = rule.window - 1
        tokens, document_starts = with_past(tokens, initial_state, document_starts, rule.window)
        initial_state = None
    x, (batch, length, heads, headdim) = tokens.x.double(), tokens.x.shape
    B, C = (m.double().repeat_interleave(heads // m.shape[2], dim=2) for m in (tokens.B, tokens.C))
    decay, insert = tokens.log_decay.double().exp(), tokens.insert.double()
    h = x.new_zeros(batch, heads, headdim, B.shape[3]) if initial_state is None else initial_state.double()
    held = x.new_zeros(rule.window or 0, *h.shape)
    count = torch.zeros(batch, dtype=torch.int64, device=x.device) if position is None else position.clone()
    outputs, states = [], [h[:, None][:, :0]]
    for t in range(length):
        fresh = torch.zeros_like(count, dtype=torch.bool)
        if document_starts is not None:
            fresh = document_starts[:, t]
            count = count.masked_fill(fresh, 0)
        if rule.name == "hard_reset":
            fresh = fresh | (count > 0) & (count % every == 0)
        forgotten = fresh[:, None, None, None]
        inserted = (insert[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        if rule.window is not None:
            kept = decay[:, t, :, None, None] * held[1:].masked_fill(forgotten, 0.0)
            held = torch.cat([kept, inserted[None]])
            h = held.sum(0)
        else:
            h = decay[:, t, :, None, None] * h.masked_fill(forgotten, 0.0) + inserted
        count = count + 1
        read = h
        if rule.max_norm is not None:
            h = torch.where((count % every == 0)[:, None, None, None], _clipped(h, rule.max_norm), h)
            read = h if every == 1 else read
        outputs.append((read * C[:, t, :, None, :]).sum(-1))
        if states_every is not None and t >= past and (t - past + 1) % states_every == 0:
            states.append(h[:, None])
    y = torch.stack(outputs, dim=1)[:, past:]
    if D is not None:
        y = y + x[:, past:] * (D.double() if D.dim() == 2 else D.double()[:, None])
    dtype = torch.float64 if tokens.x.dtype == torch.float64 else torch.float32
    taken = None if states_every is None else torch.cat(states, 1).to(dtype)
    final: Any = h.to(dtype)
    if rule.window is not None:
        last = last_window(tokens, document_starts, rule.window)
        wide = {name: getattr(last, name).to(dtype) for name in ("log_decay", "insert", "rest")}
        final = last._replace(**wide)
    return y.to(tokens.x.dtype), final, taken


def _clipped(h: Tensor, max_norm: float | Tensor) -> Tensor:
    """Every head's (P, N) matrix brought down to its largest Frobenius norm."""
    norm = torch.linalg.matrix_norm(h, keepdim=True)
    limit = torch.as_tensor(max_norm, dtype=h.dtype, device=h.device).view(-1, 1, 1).expand_as(norm)
    over = norm > limit
    return torch.where(over, h / torch.where(over, norm, 1.0) * torch.where(over, limit, 1.0), h)

"""The oracle: the recurrence as written, one token at a time, in float64. Serial on purpose; O(T) steps."""

from typing import Any

import torch
from torch import Tensor

from kernels.ssd.core import Tokens
from kernels.ssd.mitigation import NONE, Mitigation


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
    x, (batch, length, heads, headdim) = tokens.x.double(), tokens.x.shape
    B, C = (m.double().repeat_interleave(heads // m.shape[2], dim=2) for m in (tokens.B, tokens.C))
    decay, insert = tokens.log_decay.double().exp(), tokens.insert.double()
    h = x.new_zeros(batch, heads, headdim, B.shape[3]) if initial_state is None else initial_state.double()
    outputs, states = [], [h[:, None][:, :0]]
    for t in range(length):
        if document_starts is not None:
            h = h.masked_fill(document_starts[:, t, None, None, None], 0.0)
        inserted = (insert[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        h = decay[:, t, :, None, None] * h + inserted
        outputs.append((h * C[:, t, :, None, :]).sum(-1))
        if states_every is not None and (t + 1) % states_every == 0:
            states.append(h[:, None])
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + x * (D.double() if D.dim() == 2 else D.double()[:, None])
    state_dtype = torch.float64 if tokens.x.dtype == torch.float64 else torch.float32
    kept = None if states_every is None else torch.cat(states, 1).to(state_dtype)
    return y.to(tokens.x.dtype), h.to(state_dtype), kept

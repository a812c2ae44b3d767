"""Mitigations composed from a core scan: one composition serves every core."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kernels.ssd.core import Core, Tokens, span_of, token_counts
from kernels.ssd.heads import per_head
from kernels.ssd.mitigation import Mitigation
from kernels.ssd.states import states_after
from kernels.ssd.window import sliding_window


def composed_scan(
    core: Core,
    tokens: Tokens,
    D: Tensor | None,
    initial_state: Any,
    document_starts: Tensor | None,
    position: Tensor | None,
    mitigation: Mitigation,
    states_every: int | None,
    windowed: Callable[..., Tensor | None] | None = None,
) -> tuple[Tensor, Any, Tensor | None]:
    """y, the final state and, with `states_every`, the states: arguments as `ssd_scan` takes them.

    windowed: a core's own sliding_window from no past, which may decline with None.
    """
    name, every = mitigation.name, mitigation.every
    if mitigation.window is not None:
        return sliding_window(
            core, tokens, D, initial_state, document_starts, mitigation.window, states_every, windowed
        )
    if name == "state_norm":
        return state_norm(core, tokens, D, initial_state, document_starts, position, mitigation, states_every)
    if name == "hard_reset" and every is not None:
        document_starts = hard_resets(document_starts, position, tokens.x, every)
    y, state = core(*tokens, D, initial_state, document_starts)
    states = None
    if states_every is not None:
        states = states_after(tokens, initial_state, document_starts, states_every)
    return y, state, states


def hard_resets(starts: Tensor | None, position: Tensor | None, x: Tensor, every: int) -> Tensor:
    """(B, T) bool: document starts and, counted from them, every r-th token after."""
    counts = token_counts(starts, position, x)
    resets = (counts > 0) & (counts % every == 0)
    return resets if starts is None else resets | starts


def state_norm(
    core: Core,
    tokens: Tokens,
    D: Tensor | None,
    state: Tensor | None,
    document_starts: Tensor | None,
    position: Tensor | None,
    mitigation: Mitigation,
    states_every: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Serial: one scan for each span between the tokens at which any row is clipped.

    Clipping is not linear in the state, so no parallel form exists. Where spans end is read on the host.
    """
    every, max_norm = mitigation.every, mitigation.max_norm
    assert every is not None
    assert max_norm is not None
    x, length = tokens.x, tokens.length
    clipped = (token_counts(document_starts, position, x) + 1) % every == 0
    ends = {length, *(clipped.any(0).nonzero().flatten() + 1).tolist()}
    k = states_every or length + 1
    ends |= set(range(k, length + 1, k))
    outputs: list[Tensor] = []
    states: list[Tensor] = []
    for start, stop in pairwise([0, *sorted(ends)]):
        span, starts = tokens.span(start, stop), span_of(document_starts, start, stop)
        # with k = 1 every span is one token, y reads the clipped state and D x_t must stay as it is
        y, unclipped = core(*span, D if every > 1 else None, state, starts)
        scale = clip(unclipped, max_norm, clipped[:, stop - 1])
        state = unclipped * scale[..., None, None]
        outputs.append(y if every > 1 else y * scale[:, None, :, None].to(y.dtype))
        if stop % k == 0:
            states.append(state)
    y = torch.cat(outputs, 1)
    if every == 1 and D is not None:
        y = y + x * D.to(x.dtype).view(x.shape[2], -1)
    assert state is not None
    if states_every is None:
        return y, state, None
    return y, state, torch.stack(states, 1) if states else state[:, None][:, :0]


def clip(state: Tensor, max_norm: float | Tensor, rows: Tensor) -> Tensor:
    """(B, H): what brings a head's Frobenius norm down to max_norm in these rows, 1 elsewhere."""
    norm = torch.linalg.vector_norm(state, dim=(2, 3))
    limit = per_head(max_norm, norm.shape[1], norm.device, norm.dtype)
    over = (norm > limit) & rows[:, None]
    # one where: at a norm of 0 or a limit of inf the quotient has no gradient
    return torch.where(over, limit, 1.0) / torch.where(over, norm, 1.0)

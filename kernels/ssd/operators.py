"""Mitigations composed from a core scan: one composition serves every core."""

from typing import Any

from torch import Tensor

from kernels.ssd.core import Core, Tokens
from kernels.ssd.mitigation import Mitigation
from kernels.ssd.states import states_after


def composed_scan(
    core: Core,
    tokens: Tokens,
    D: Tensor | None,
    initial_state: Any,
    document_starts: Tensor | None,
    position: Tensor | None,
    mitigation: Mitigation,
    states_every: int | None,
) -> tuple[Tensor, Any, Tensor | None]:
    """y, the final state and, with `states_every`, the states: arguments as `ssd_scan` takes them."""
    y, state = core(*tokens, D, initial_state, document_starts)
    states = None
    if states_every is not None:
        states = states_after(tokens, initial_state, document_starts, states_every)
    return y, state, states

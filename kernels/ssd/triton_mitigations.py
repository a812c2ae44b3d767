"""Mitigations that the Triton scan has kernels for, discretised inside, as the plain scan.

Whatever is not among them is composed of scans (`operators`).
"""

from torch import Tensor

from kernels.ssd.core import Tokens
from kernels.ssd.mitigation import Mitigation
from kernels.ssd.triton_call import Decay
from kernels.ssd.triton_clip import clipped_scan
from kernels.ssd.triton_scan import given_decay
from kernels.ssd.triton_window import windowed_scan
from kernels.ssd.window import State, Window


def mitigated_scan(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: State | None,
    document_starts: Tensor | None,
    position: Tensor | None,
    decay: Decay,
    mitigation: Mitigation,
) -> tuple[Tensor, Tensor | None] | None:
    """y and the final state, None under sliding_window; or None where the mitigation has to be composed."""
    if mitigation.window is not None and initial_state is None:
        y = windowed_scan(x, B, C, D, document_starts, decay, mitigation.window)
        return None if y is None else (y, None)
    if mitigation.max_norm is not None and document_starts is None:
        assert not isinstance(initial_state, Window)
        return clipped_scan(x, B, C, D, initial_state, decay, position, mitigation)
    return None


def windowed_tokens(
    tokens: Tokens, D: Tensor | None, document_starts: Tensor | None, window: int
) -> Tensor | None:
    """`windowed_scan` of discretised tokens."""
    decay = given_decay(tokens.log_decay, tokens.insert)
    return windowed_scan(tokens.x, tokens.B, tokens.C, D, document_starts, decay, window)

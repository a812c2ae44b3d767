"""state_norm in one kernel: on Hopper, without gradients, where tokens are clipped at the ends of chunks.

Elsewhere `operators.state_norm` composes it of one scan for every span between clipped tokens.
"""

import torch
from torch import Tensor

from kernels.ssd.core import Tokens
from kernels.ssd.heads import per_head
from kernels.ssd.mitigation import Mitigation
from kernels.ssd.triton_launch import LARGEST, Decay
from kernels.ssd.triton_scan import in_reach, on_hopper
from kernels.triton_support import on_device

CLIPPED_HEADDIM = 64  # a head's whole state in one program: its norm needs no other


@torch.library.custom_op("longstate::ssd_scan_clipped", mutates_args=())
def _scan_clipped(
    x: Tensor,
    log_decay: Tensor,
    insert: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    max_norm: Tensor,
    every: int,
    before: int,
) -> tuple[Tensor, Tensor]:
    from kernels.ssd.hopper_launch import CHUNK, Clip, HopperLaunches

    decay = Decay(log_decay, None, None, None, None, insert, False, 0.0, LARGEST)
    with on_device(x):
        call = HopperLaunches(x, B, C, None, None, 1)
        sums, inserts = call.decay_sums(decay)
        clip = Clip(max_norm, every // CHUNK, before // CHUNK)
        y, final, _ = call.forward(sums, inserts, D, initial, clip)
    return y, final


@_scan_clipped.register_fake
def _scan_clipped_fake(
    x: Tensor,
    log_decay: Tensor,
    insert: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    max_norm: Tensor,
    every: int,
    before: int,
) -> tuple[Tensor, Tensor]:
    state = x.new_empty(x.shape[0], x.shape[2], x.shape[3], B.shape[3], dtype=torch.float32)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), state


def clipped_scan(
    tokens: Tokens,
    D: Tensor | None,
    state: Tensor | None,
    document_starts: Tensor | None,
    position: Tensor | None,
    mitigation: Mitigation,
    states_every: int | None,
) -> tuple[Tensor, Tensor] | None:
    """y and the final state under state_norm, or None where it has to be composed."""
    chunk, every = 64, mitigation.every
    given = [*tokens, *(t for t in (D, state, mitigation.max_norm) if isinstance(t, Tensor))]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return None
    if every is None or every % chunk or document_starts is not None or states_every is not None:
        return None
    if tokens.x.shape[3] != CLIPPED_HEADDIM or not on_hopper(tokens.x, tokens.B):
        return None
    before = set() if position is None else {count % every for count in position.tolist()}
    if len(before) > 1 or any(count % chunk for count in before):
        return None
    assert mitigation.max_norm is not None
    x = tokens.x
    max_norm = per_head(mitigation.max_norm, x.shape[2], x.device, torch.float32)
    x, B, C = (t if in_reach(t) else t.contiguous() for t in (x, tokens.B, tokens.C))
    return _scan_clipped(
        x, tokens.log_decay.float(), tokens.insert.float(), B, C,
        None if D is None else D.float().contiguous(),
        None if state is None else state.float().contiguous(),
        max_norm.contiguous(), every, max(before, default=0),
    )  # fmt: skip

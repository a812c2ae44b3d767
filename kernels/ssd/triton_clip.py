"""state_norm in one kernel: on Hopper, without gradients, where tokens are clipped at the ends of chunks.

Elsewhere `operators.state_norm` composes it of one scan for every span between clipped tokens.
"""

import torch
from torch import Tensor

from kernels.ssd.heads import per_head
from kernels.ssd.mitigation import Mitigation
from kernels.ssd.triton_call import Decay
from kernels.ssd.triton_scan import in_reach, on_hopper
from kernels.triton_support import on_device

CLIPPED_HEADDIM = 64  # a head's whole state in one program: its norm needs no other
CHUNK = 64  # of `hopper_tiles`, which needs a Triton that has Gluon


@torch.library.custom_op("longstate::ssd_scan_clipped", mutates_args=())
def _scan_clipped(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    dt: Tensor,
    rate: Tensor | None,
    log_alpha: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    insert: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    max_norm: Tensor,
    every: int,
    before: int,
) -> tuple[Tensor, Tensor]:
    from kernels.ssd.hopper_launch import Clip, HopperLaunches

    decay = Decay(dt, rate, log_alpha, weight, bias, insert, softplus, low, high)
    with on_device(x):
        call = HopperLaunches(x, B, C, None, None, 0)
        sums, inserts = call.decay_sums(decay)
        clip = Clip(max_norm, every // CHUNK, before // CHUNK)
        y, final, _ = call.forward(sums, inserts, D, initial, clip=clip)
    return y, final


@_scan_clipped.register_fake
def _scan_clipped_fake(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    dt: Tensor,
    rate: Tensor | None,
    log_alpha: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    insert: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    max_norm: Tensor,
    every: int,
    before: int,
) -> tuple[Tensor, Tensor]:
    state = x.new_empty(x.shape[0], x.shape[2], x.shape[3], B.shape[3], dtype=torch.float32)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), state


def clipped_scan(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    decay: Decay,
    position: Tensor | None,
    mitigation: Mitigation,
) -> tuple[Tensor, Tensor] | None:
    """y and the final state under state_norm, or None where it has to be composed."""
    every, max_norm = mitigation.every, mitigation.max_norm
    assert every is not None
    assert max_norm is not None
    given = [t for t in (x, B, C, D, state, max_norm, *decay) if isinstance(t, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return None
    if every % CHUNK or x.shape[3] != CLIPPED_HEADDIM or not on_hopper(x, B):
        return None
    before = set() if position is None else {count % every for count in position.tolist()}
    if len(before) > 1 or any(count % CHUNK for count in before):
        return None
    x, B, C = (t if in_reach(t) else t.contiguous() for t in (x, B, C))
    D, state = (None if t is None else t.float().contiguous() for t in (D, state))
    limit = per_head(max_norm, x.shape[2], x.device, torch.float32).contiguous()
    return _scan_clipped(x, B, C, D, state, *decay, limit, every, max(before, default=0))

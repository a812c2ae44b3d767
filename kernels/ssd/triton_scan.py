"""The SSD scan on Triton kernels as one differentiable operator, `longstate::ssd_scan`."""

from typing import Any

import torch
import triton
from torch import Tensor

from kernels.ssd.triton_call import LARGEST, Decay
from kernels.ssd.triton_launch import Launches
from kernels.ssd.triton_schedule import LARGEST_STATE, is_hopper
from kernels.triton_support import on_device

LARGEST_STEP = 2**24  # elements from token to token
# What the kernels of `hopper_launch` take; all else runs on those of `triton_launch`.
HOPPER_DTYPES = (torch.bfloat16, torch.float16)
HOPPER_HEADDIMS, HOPPER_D_STATES = (64, 128), (16, 32, 64, 128, 256)


def in_reach(t: Tensor) -> bool:
    """Whether the kernels read t (B, T, heads, columns) where it is: offsets inside a chunk are 32-bit."""
    return t.stride(3) == 1 and t.stride(1) <= LARGEST_STEP


def on_hopper(x: Tensor, B: Tensor) -> bool:
    """Whether the kernels for Hopper take such inputs: by device, dtype and sizes alone."""
    sizes = x.shape[3] in HOPPER_HEADDIMS and B.shape[3] in HOPPER_D_STATES
    return sizes and x.dtype in HOPPER_DTYPES and is_hopper(x.device)


def launches(x: Tensor, B: Tensor, *rest: Any) -> Launches:
    """The launches of a call."""
    if on_hopper(x, B):
        from kernels.ssd.hopper_launch import HopperLaunches  # needs a Triton that has Gluon

        return HopperLaunches(x, B, *rest)
    return Launches(x, B, *rest)


def like(t: Tensor) -> Tensor:
    """Room for another of its shape, contiguous."""
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


def of_numbers(per_head: Tensor, numbers: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """The gradients of rate, log_alpha, weight and bias, of (4, H), where there are such numbers."""
    return [None if t is None else g.to(t.dtype) for t, g in zip(numbers, per_head, strict=True)]


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("longstate::ssd_scan", mutates_args=())
def _scan(
    x: Tensor,
    dt: Tensor,
    rate: Tensor | None,
    log_alpha: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    insert: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    documents: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    segments: int,
) -> Outputs:
    """y, final state, chunk sums, insertion weights, states that enter the segments."""
    decay = Decay(dt, rate, log_alpha, weight, bias, insert, softplus, low, high)
    with on_device(x):
        call = launches(x, B, C, documents, cu_seqlens, segments)
        sums, inserts = call.decay_sums(decay)
        y, final, borders = call.forward(sums, inserts, D, initial)
    return y, final, sums, inserts, borders


@_scan.register_fake
def _scan_fake(
    x: Tensor,
    dt: Tensor,
    rate: Tensor | None,
    log_alpha: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    insert: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    documents: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    segments: int,
) -> Outputs:
    call = launches(x, B, C, documents, cu_seqlens, segments)
    sums = x.new_empty(call.batch, call.heads, call.length, dtype=torch.float32)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, call.state(), sums, torch.empty_like(sums), call.state(call.plan.segments)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("longstate::ssd_scan_backward", mutates_args=())
def _scan_backward(
    x: Tensor,
    dt: Tensor,
    rate: Tensor | None,
    log_alpha: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    insert: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    documents: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    segments: int,
    sums: Tensor,
    inserts: Tensor,
    borders: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
) -> Gradients:
    """dx, ddt, gradients of rate, log_alpha, weight and bias (4, H), dinsert, dB, dC, dD, dinitial."""
    decay = Decay(dt, rate, log_alpha, weight, bias, insert, softplus, low, high)
    with on_device(x):
        call = launches(x, B, C, documents, cu_seqlens, segments)
        dx, dB, dC, dsums, dinserts, dD, dinitial = call.backward(sums, inserts, D, borders, dy, dfinal)
        ddt, dinsert, per_head = call.decay_sums_backward(decay, dsums, dinserts)
    return dx, ddt, per_head, dinsert, dB, dC, dD, dinitial


@_scan_backward.register_fake
def _scan_backward_fake(
    x: Tensor,
    dt: Tensor,
    rate: Tensor | None,
    log_alpha: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    insert: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    documents: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    segments: int,
    sums: Tensor,
    inserts: Tensor,
    borders: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
) -> Gradients:
    initial = borders.new_empty(borders.shape[0], *borders.shape[2:])
    dinsert = dt.new_empty(0, dtype=torch.float32) if insert is None else like(sums.transpose(1, 2))
    dD = sums.new_empty(()) if D is None else like(D)
    return like(x), like(dt), sums.new_empty(4, x.shape[2]), dinsert, like(B), like(C), dD, initial


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, dt, rate, log_alpha, weight, bias, insert, B, C, D, initial, documents, cu_seqlens, *options = inputs
    _, _, sums, inserts, borders = output
    ctx.mark_non_differentiable(sums, inserts, borders)
    ctx.save_for_backward(
        x, dt, rate, log_alpha, weight, bias, insert, B, C, D, documents, cu_seqlens, sums, inserts, borders
    )
    ctx.options, ctx.has_initial = options, initial is not None


def _backward(ctx: Any, dy: Tensor, dfinal: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: a second time a checkpoint refuses
    inputs, (sums, inserts, borders) = saved[:-3], saved[-3:]
    rate, log_alpha, weight, bias, insert = inputs[2:7]
    D = inputs[9]
    if not in_reach(dy):
        dy = dy.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    dx, ddt, per_head, dinsert, dB, dC, dD, dinitial = _scan_backward(
        *inputs, *ctx.options, sums, inserts, borders, dy, dfinal
    )
    given = of_numbers(per_head, (rate, log_alpha, weight, bias))
    return (
        dx, ddt, *given, None if insert is None else dinsert, dB, dC, None if D is None else dD.to(D.dtype),
        dinitial if ctx.has_initial else None, *[None] * 6,
    )  # fmt: skip


_scan.register_autograd(_backward, setup_context=_setup_context)


def raw_decay(
    dt: Tensor,
    factors: tuple[Tensor, Tensor | None, Tensor | None],
    bias: Tensor | None,
    softplus: bool,
    limit: tuple[float, float] | None,
) -> Decay:
    """factors: see `discretize.per_head_factors`. Otherwise as `kernels.ssd.ssd_scan`."""
    low, high = limit or (0.0, LARGEST)
    rate, log_alpha, weight, bias = (None if t is None else t.float().contiguous() for t in (*factors, bias))
    return Decay(dt, rate, log_alpha, weight, bias, None, softplus, float(low), min(float(high), LARGEST))


def given_decay(log_decay: Tensor, insert: Tensor) -> Decay:
    """Of log decays and weights that are there already."""
    return Decay(log_decay.float(), None, None, None, None, insert.float(), False, 0.0, LARGEST)


def numbers_of(document_starts: Tensor | None) -> Tensor | None:
    """How many documents have begun, (B, T) int32."""
    if document_starts is None:
        return None
    return document_starts.to(torch.int32).cumsum(1, dtype=torch.int32)


def check_state(headdim: int, d_state: int, element_size: int) -> None:
    """Refuse a state that no kernel of the backward pass holds, where there may be one."""
    state_bytes = triton.next_power_of_2(headdim) * triton.next_power_of_2(d_state) * element_size
    if state_bytes > LARGEST_STATE and torch.is_grad_enabled():
        raise ValueError(
            f"headdim={headdim}, d_state={d_state}: a state of {state_bytes} bytes is more "
            f"than the {LARGEST_STATE} of the Triton backward pass: use backend='chunked' or no_grad()"
        )


def triton_scan(
    x: Tensor,
    log_decay: Tensor,
    insert: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    document_starts: Tensor | None,
    chunk_size: int = 0,
    *,
    segments: int = 0,
) -> tuple[Tensor, Tensor]:
    """As `kernels.ssd.chunked.chunked_scan`. `chunk_size` plays no part: `triton_schedule` chooses.

    segments: 0 for the rule of `triton_schedule`, else how many to cut each row into.
    """
    return _call(x, given_decay(log_decay, insert), B, C, D, initial_state, document_starts, None, segments)


def triton_fused_scan(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    log_alpha: Tensor | None,
    weight: Tensor | None,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
    segments: int = 0,
) -> tuple[Tensor, Tensor]:
    """The scan with its discretisation in the kernels.

    rate, log_alpha, weight: (H,), see `discretize.per_head_factors`. Otherwise as `kernels.ssd.ssd_scan`.
    """
    decay = raw_decay(dt, (rate, log_alpha, weight), dt_bias, dt_softplus, dt_limit)
    return _call(x, decay, B, C, D, initial_state, document_starts, cu_seqlens, segments)


def _call(
    x: Tensor,
    decay: Decay,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: int,
) -> tuple[Tensor, Tensor]:
    check_state(x.shape[3], B.shape[3], x.element_size())
    x, B, C = (t if in_reach(t) else t.contiguous() for t in (x, B, C))
    D = None if D is None else D.float().contiguous()
    initial = None if initial is None else initial.float().contiguous()
    tensors, options = decay[:6], decay[6:]
    y, final, *_ = _scan(x, *tensors, B, C, D, initial, numbers_of(starts), cu_seqlens, *options, segments)
    return y, final

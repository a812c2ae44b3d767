"""sliding_window as one differentiable operator, `longstate::ssd_window`: on Hopper, from no past.

As `kernels.ssd.window` composes it, of a scan that is reset at every block and one backwards over the block
before; but the second reads the inputs where they lie and adds to the first one's y.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ssd.triton_call import Decay
from kernels.ssd.triton_reach import scaled_ahead, window_decays, window_decays_backward
from kernels.ssd.triton_scan import in_reach, like, numbers_of, of_numbers, on_hopper
from kernels.triton_support import on_device

MOST_APART = 64  # chunks: longer blocks are cut at tokens, so that states of any block fit a slab

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _launches(x: Tensor, B: Tensor, C: Tensor, documents: Tensor | None, window: int, **options: Any) -> Any:
    """Of a scan that is reset at every block. Where blocks are whole chunks their scans are apart, elsewhere
    blocks are documents."""
    from kernels.ssd.hopper_launch import CHUNK, HopperLaunches

    if window % CHUNK == 0 and window <= MOST_APART * CHUNK:
        return HopperLaunches(x, B, C, documents, None, 0, apart=window // CHUNK, **options)
    blocks = torch.arange(x.shape[1], device=x.device, dtype=torch.int32) // window
    blocks = blocks.expand(x.shape[0], -1)
    numbers = blocks.contiguous() if documents is None else blocks + documents
    return HopperLaunches(x, B, C, numbers, None, 0, **options)


@torch.library.custom_op("longstate::ssd_window", mutates_args=())
def _window(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    documents: Tensor | None,
    dt: Tensor,
    rate: Tensor | None,
    log_alpha: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    insert: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    window: int,
) -> Outputs:
    """y; chunk sums, weights and segment states of the first scan; keeps and reaches of the second."""
    decay = Decay(dt, rate, log_alpha, weight, bias, insert, softplus, low, high)
    with on_device(x):
        call = _launches(x, B, C, documents, window)
        sums, inserts = call.decay_sums(decay)
        keeps, reaches = window_decays(sums, documents, window, call.plan.chunk)
        y, _, borders = call.forward(sums, inserts, D, None)
        call.add_reach(y, keeps, inserts, reaches, window)
    return y, sums, inserts, borders, keeps, reaches


@_window.register_fake
def _window_fake(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    documents: Tensor | None,
    dt: Tensor,
    rate: Tensor | None,
    log_alpha: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    insert: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    window: int,
) -> Outputs:
    call = _launches(x, B, C, documents, window)
    sums = x.new_empty(call.batch, call.heads, call.length, dtype=torch.float32)
    borders = call.state(0 if call.apart else call.plan.segments)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, sums, torch.empty_like(sums), borders, torch.empty_like(sums), torch.empty_like(sums)


@torch.library.custom_op("longstate::ssd_window_backward", mutates_args=())
def _window_backward(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    documents: Tensor | None,
    dt: Tensor,
    rate: Tensor | None,
    log_alpha: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    insert: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    window: int,
    sums: Tensor,
    inserts: Tensor,
    borders: Tensor,
    keeps: Tensor,
    reaches: Tensor,
    dy: Tensor,
) -> Gradients:
    """dx, dB, dC, dD, ddt, gradients of rate, log_alpha, weight and bias (4, H), dinsert."""
    decay = Decay(dt, rate, log_alpha, weight, bias, insert, softplus, low, high)
    shift = window - 1
    with on_device(x):
        near = _launches(x, B, C, documents, window)
        dx, dB, dC, dsums, dinserts, dD, _ = near.backward(sums, inserts, D, borders, dy, None)
        # The second scan, where its sources are: a target is where its sources begin. Decays and documents
        # are in keeps and reaches.
        ahead = F.pad(C[:, shift:], (0, 0, 0, 0, 0, shift))
        far = _launches(x, B, ahead, None, window, reversed=True)
        more_dx, more_dB, more_dC, dscales, dweights = far.reversed_gradients(
            keeps * inserts, scaled_ahead(dy, reaches, shift)
        )
        dx += more_dx
        dB += more_dB
        dC[:, shift:] += more_dC[:, : x.shape[1] - shift]
        more = window_decays_backward(keeps, inserts, dscales, dweights, dinserts, window)
        ddt, dinsert, per_head = near.decay_sums_backward(decay, dsums, dinserts, more)
    return dx, dB, dC, dD, ddt, per_head, dinsert


@_window_backward.register_fake
def _window_backward_fake(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    documents: Tensor | None,
    dt: Tensor,
    rate: Tensor | None,
    log_alpha: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    insert: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    window: int,
    sums: Tensor,
    inserts: Tensor,
    borders: Tensor,
    keeps: Tensor,
    reaches: Tensor,
    dy: Tensor,
) -> Gradients:
    dinsert = dt.new_empty(0, dtype=torch.float32) if insert is None else like(sums.transpose(1, 2))
    dD = sums.new_empty(()) if D is None else like(D)
    return like(x), like(B), like(C), dD, like(dt), sums.new_empty(4, x.shape[2]), dinsert


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    tensors, options = inputs[:11], inputs[11:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.options = options


def _backward(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: a second time a checkpoint refuses
    tensors, kept = saved[:11], saved[11:]
    D, (rate, log_alpha, weight, bias, insert) = tensors[3], tensors[6:]
    if not in_reach(dy):
        dy = dy.contiguous()
    dx, dB, dC, dD, ddt, per_head, dinsert = _window_backward(*tensors, *ctx.options, *kept, dy)
    given = of_numbers(per_head, (rate, log_alpha, weight, bias))
    return (
        dx, dB, dC, None if D is None else dD.to(D.dtype), None, ddt, *given,
        None if insert is None else dinsert, *[None] * 4,
    )  # fmt: skip


_window.register_autograd(_backward, setup_context=_setup_context)


def windowed_scan(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    document_starts: Tensor | None,
    decay: Decay,
    window: int,
) -> Tensor | None:
    """y under sliding_window, from no past, or None where it has to be composed."""
    if not on_hopper(x, B) or not 1 < window < x.shape[1]:
        return None
    x, B, C = (t if in_reach(t) else t.contiguous() for t in (x, B, C))
    D = None if D is None else D.float().contiguous()
    return _window(x, B, C, D, numbers_of(document_starts), *decay, window)[0]

"""The fused layer as one differentiable operator, `longstate::mixer`, of the other folders' launches."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.conv import triton_conv
from kernels.norm import triton_norm
from kernels.ssd.triton_launch import Decay
from kernels.ssd.triton_scan import check_state, launches, like, numbers_of, of_numbers, raw_decay
from kernels.triton_support import on_device

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _slices(zxbcdt: Tensor, conv_dim: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """z, xBC and dt in it."""
    z, xBC, dt = zxbcdt.split([zxbcdt.shape[2] - conv_dim - heads, conv_dim, heads], dim=2)
    return z, xBC, dt


def _heads(xBC: Tensor, headdim: int, n_groups: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, T, H, P), B and C (B, T, G, N) in it."""
    of_state = (xBC.shape[2] - heads * headdim) // 2
    x, B, C = xBC.split([heads * headdim, of_state, of_state], dim=2)
    return x.unflatten(2, (heads, headdim)), B.unflatten(2, (n_groups, -1)), C.unflatten(2, (n_groups, -1))


@torch.library.custom_op("longstate::mixer", mutates_args=())
def _mixer(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    rate: Tensor,
    log_alpha: Tensor | None,
    weight: Tensor | None,
    dt_bias: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    out_weight: Tensor,
    before: Tensor | None,
    initial: Tensor | None,
    starts: Tensor | None,
    headdim: int,
    n_groups: int,
    eps: float,
    norm_before_gate: bool,
    low: float,
    high: float,
) -> Outputs:
    """out, final states of convolution and scan; y, inverse root mean squares, chunk sums, insertion weights,
    states that enter the segments."""
    z, xBC, dt = _slices(zxbcdt, len(conv_weight), len(rate))
    decay = Decay(dt, rate, log_alpha, weight, dt_bias, None, True, low, high)
    xBC, tail = triton_conv.launch_forward(xBC, before, conv_weight, conv_bias, starts, None, True)
    with on_device(zxbcdt):
        call = launches(*_heads(xBC, headdim, n_groups, len(rate)), numbers_of(starts), None, 0)
        sums, inserts = call.decay_sums(decay)
        y, final, borders = call.forward(sums, inserts, D, initial)
    y = y.flatten(2)
    normed, inverse = triton_norm.launch_forward(
        y, z, norm_weight, eps, n_groups, norm_before_gate, zxbcdt.dtype
    )
    return F.linear(normed, out_weight), tail, final, y, inverse, sums, inserts, borders


@_mixer.register_fake
def _mixer_fake(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    rate: Tensor,
    log_alpha: Tensor | None,
    weight: Tensor | None,
    dt_bias: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    out_weight: Tensor,
    before: Tensor | None,
    initial: Tensor | None,
    starts: Tensor | None,
    headdim: int,
    n_groups: int,
    eps: float,
    norm_before_gate: bool,
    low: float,
    high: float,
) -> Outputs:
    (batch, length, _), (channels, width), new = zxbcdt.shape, conv_weight.shape, zxbcdt.new_empty
    xBC = new(batch, length, channels)
    call = launches(*_heads(xBC, headdim, n_groups, len(rate)), numbers_of(starts), None, 0)
    sums = new(batch, len(rate), length, dtype=torch.float32)
    return (
        new(batch, length, len(out_weight)), new(batch, width - 1, channels), call.state(),
        new(batch, length, len(norm_weight)), new(batch, length, n_groups, dtype=torch.float32),
        sums, torch.empty_like(sums), call.state(call.plan.segments),
    )  # fmt: skip


@torch.library.custom_op("longstate::mixer_backward", mutates_args=())
def _mixer_backward(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    rate: Tensor,
    log_alpha: Tensor | None,
    weight: Tensor | None,
    dt_bias: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    out_weight: Tensor,
    before: Tensor | None,
    starts: Tensor | None,
    y: Tensor,
    inverse: Tensor,
    sums: Tensor,
    inserts: Tensor,
    borders: Tensor,
    headdim: int,
    n_groups: int,
    eps: float,
    norm_before_gate: bool,
    low: float,
    high: float,
    dout: Tensor,
    dtail: Tensor | None,
    dfinal: Tensor | None,
) -> Gradients:
    """Gradients of zxbcdt, conv_weight, conv_bias, of rate, log_alpha, weight and dt_bias (4, H), of D,
    norm_weight, out_weight, before (empty if None) and the initial state."""
    z, xBC, dt = _slices(zxbcdt, len(conv_weight), len(rate))
    dzxbcdt = like(zxbcdt)
    dz, dxBC, ddt = _slices(dzxbcdt, len(conv_weight), len(rate))
    decay = Decay(dt, rate, log_alpha, weight, dt_bias, None, True, low, high)

    normed = like(y)
    dy, _, dnorm_weight = triton_norm.launch_backward(
        dout @ out_weight, y, z, norm_weight, inverse, n_groups, norm_before_gate, dz=dz, y=normed
    )
    dout_weight = dout.flatten(0, 1).t() @ normed.flatten(0, 1)
    del normed

    conv = (before, conv_weight, conv_bias, starts, None, True)
    seen, _ = triton_conv.launch_forward(xBC, *conv)
    dseen, shape = like(seen), (headdim, n_groups, len(rate))
    with on_device(zxbcdt):
        call = launches(*_heads(seen, *shape), numbers_of(starts), None, 0)
        _, _, _, dsums, dinserts, dD, dinitial = call.backward(
            sums, inserts, D, borders, dy.unflatten(2, (-1, headdim)), dfinal, into=_heads(dseen, *shape)
        )
        _, _, per_head = call.decay_sums_backward(decay, dsums, dinserts, ddt=ddt)
    _, dbefore, dconv_weight, dconv_bias = triton_conv.launch_backward(dseen, dtail, xBC, *conv, dx=dxBC)
    return (
        dzxbcdt, dconv_weight, dconv_bias, per_head, dD, dnorm_weight, dout_weight, dbefore, dinitial
    )  # fmt: skip


@_mixer_backward.register_fake
def _mixer_backward_fake(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    rate: Tensor,
    log_alpha: Tensor | None,
    weight: Tensor | None,
    dt_bias: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    out_weight: Tensor,
    before: Tensor | None,
    starts: Tensor | None,
    y: Tensor,
    inverse: Tensor,
    sums: Tensor,
    inserts: Tensor,
    borders: Tensor,
    headdim: int,
    n_groups: int,
    eps: float,
    norm_before_gate: bool,
    low: float,
    high: float,
    dout: Tensor,
    dtail: Tensor | None,
    dfinal: Tensor | None,
) -> Gradients:
    dbefore = zxbcdt.new_empty(0) if before is None else like(before)
    dinitial = borders.new_empty(borders.shape[0], *borders.shape[2:])
    return (
        like(zxbcdt), like(conv_weight), like(conv_bias), sums.new_empty(4, len(rate)), like(D),
        like(norm_weight), like(out_weight), dbefore, dinitial,
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    *tensors, before, initial, starts, headdim, n_groups, eps, norm_before_gate, low, high = inputs
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*tensors, before, starts, *output[3:])
    ctx.options, ctx.has_initial = (headdim, n_groups, eps, norm_before_gate, low, high), initial is not None


def _backward(
    ctx: Any, dout: Tensor, dtail: Tensor | None, dfinal: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: a second time a checkpoint refuses
    rate, log_alpha, weight, dt_bias = saved[3:7]
    dfinal = None if dfinal is None else dfinal.contiguous()
    dzxbcdt, dconv_weight, dconv_bias, per_head, dD, dnorm_weight, dout_weight, dbefore, dinitial = (
        _mixer_backward(*saved, *ctx.options, dout.contiguous(), dtail, dfinal)
    )
    return (
        dzxbcdt, dconv_weight, dconv_bias, *of_numbers(per_head, (rate, log_alpha, weight, dt_bias)), dD,
        dnorm_weight, dout_weight, None if saved[10] is None else dbefore,
        dinitial if ctx.has_initial else None, *[None] * 7,
    )  # fmt: skip


_mixer.register_autograd(_backward, setup_context=_setup_context)


def triton_mixer(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    factors: tuple[Tensor, Tensor | None, Tensor | None],
    D: Tensor,
    norm_weight: Tensor,
    out_weight: Tensor,
    before: Tensor | None,
    initial: Tensor | None,
    starts: Tensor | None,
    headdim: int,
    n_groups: int,
    eps: float,
    norm_before_gate: bool,
    dt_limit: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.mixer.fused_mixer`; factors: see `discretize.per_head_factors`; before: (B, W - 1, C)."""
    heads = len(dt_bias)
    check_state(headdim, (len(conv_weight) - heads * headdim) // 2 // n_groups, zxbcdt.element_size())
    decay = raw_decay(zxbcdt, factors, dt_bias, True, dt_limit)
    out, tail, final, *_ = _mixer(
        zxbcdt.contiguous(), conv_weight, conv_bias, decay.rate, decay.log_alpha, decay.weight, decay.bias,
        D.float().contiguous(), norm_weight, out_weight,
        None if before is None else before.to(zxbcdt.dtype),
        None if initial is None else initial.float().contiguous(),
        starts, headdim, n_groups, eps, norm_before_gate, decay.low, decay.high,
    )  # fmt: skip
    return out, tail, final

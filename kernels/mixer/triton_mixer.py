"""The fused layer as one differentiable operator, `longstate::mixer`."""

from typing import Any

import torch
from torch import Tensor

from kernels.mixer.launch import (
    Gradients,
    Options,
    Outputs,
    Weights,
    launch_backward,
    launch_forward,
    of_heads,
)
from kernels.ssd.triton_scan import launches, like, numbers_of, of_numbers


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
    weights = Weights(conv_weight, conv_bias, rate, log_alpha, weight, dt_bias, D, norm_weight, out_weight)
    options = Options(headdim, n_groups, eps, norm_before_gate, low, high)
    return launch_forward(zxbcdt, weights, before, initial, starts, options)


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
    call = launches(*of_heads(xBC, headdim, n_groups, len(rate)), numbers_of(starts), None, 0)
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
    weights = Weights(conv_weight, conv_bias, rate, log_alpha, weight, dt_bias, D, norm_weight, out_weight)
    options = Options(headdim, n_groups, eps, norm_before_gate, low, high)
    kept = (y, inverse, sums, inserts, borders)
    return launch_backward(zxbcdt, weights, before, starts, kept, options, dout, dtail, dfinal)


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
    ctx.set_materialize_grads(False)  # nor zeros for those, which are as large as what is saved
    ctx.save_for_backward(*tensors, before, starts, *output[3:])
    ctx.options, ctx.has_initial = (headdim, n_groups, eps, norm_before_gate, low, high), initial is not None


def _backward(
    ctx: Any, dout: Tensor | None, dtail: Tensor | None, dfinal: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: a second time a checkpoint refuses
    rate, log_alpha, weight, dt_bias = saved[3:7]
    if dout is None:
        dout = saved[0].new_zeros(*saved[0].shape[:2], len(saved[9]))
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
    weights: Weights,
    before: Tensor | None,
    initial: Tensor | None,
    starts: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, final states of convolution (B, W - 1, C) and scan. before: (B, W - 1, C)."""
    out, tail, final, *_ = _mixer(zxbcdt, *weights, before, initial, starts, *options)
    return out, tail, final

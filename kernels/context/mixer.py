"""The fused layer of a piece: the same two collectives and exchanges, between the same launches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.context.conv import handed_on
from kernels.context.group import Ranks
from kernels.context.scan import gradient_behind, states_between
from kernels.mixer.launch import Options, Weights, launch_backward, launch_forward, slices
from kernels.ssd.triton_scan import of_numbers

WEIGHTS = len(Weights._fields)


def context_mixer(
    context: Ranks,
    zxbcdt: Tensor,
    weights: Weights,
    before: Tensor | None,
    initial: Tensor | None,
    starts: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """`triton_mixer` of this rank's piece. States are the whole sequence's, as in `context_conv1d` and
    `context_scan`: the first rank reads those before it and is given the convolution's behind it."""
    return _Mixer.apply(context, options, starts, before, initial, zxbcdt, *weights)


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        context: Ranks,
        options: Options,
        starts: Tensor | None,
        before: Tensor | None,
        initial: Tensor | None,
        zxbcdt: Tensor,
        *given: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights, first = Weights(*given), context.rank == 0  # type: ignore[arg-type]
        _, xBC, _ = slices(zxbcdt, len(weights.conv_weight), len(weights.rate))
        ctx.has_before, ctx.has_initial = first and before is not None, first and initial is not None
        tail = context.shift(handed_on(xBC, starts, weights.conv_weight.shape[1] - 1), 1)
        if not first:
            before, tail = tail, torch.zeros_like(tail)
        seen: list[Tensor] = []

        def enter(kept: Tensor, added: Tensor) -> Tensor | None:
            entering, *others = states_between(context, kept, added, initial)()
            seen.extend(others)
            return initial if first else entering

        out, _, _, *kept = launch_forward(zxbcdt, weights, before, None, starts, options, enter)
        final, keeps = seen
        ctx.context, ctx.options = context, options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(zxbcdt, *given, before, starts, keeps, *kept)
        return out, tail, final

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor | None, dtail: Tensor | None, dfinal: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        context: Ranks = ctx.context
        zxbcdt, *saved = ctx.saved_tensors
        weights, (before, starts, keeps, *kept) = Weights(*saved[:WEIGHTS]), saved[WEIGHTS:]
        if dout is None:
            dout = zxbcdt.new_zeros(*zxbcdt.shape[:2], len(weights.out_weight))

        def leave(said: Tensor) -> Callable[[], Tensor]:
            if context.rank == 0:
                said = torch.zeros_like(said) if dfinal is None else dfinal
            return gradient_behind(context, said, keeps)

        gradients = launch_backward(
            zxbcdt, weights, before, starts, tuple(kept), ctx.options, dout.contiguous(), None, None, leave
        )
        dzxbcdt, dconv_weight, dconv_bias, per_head, dD, dnorm_weight, dout_weight, dbefore, dinitial = (
            gradients
        )
        _, dxBC, _ = slices(dzxbcdt, len(weights.conv_weight), len(weights.rate))
        lags = weights.conv_weight.shape[1] - 1
        own = dbefore
        if context.rank == 0:
            own = zxbcdt.new_zeros(len(zxbcdt), lags, dxBC.shape[2]) if dtail is None else dtail
        dxBC[:, dxBC.shape[1] - lags :] += handed_on(context.shift(own, -1), starts, lags)
        numbers = (weights.rate, weights.log_alpha, weights.weight, weights.dt_bias)
        return (
            None, None, None, dbefore if ctx.has_before else None, dinitial if ctx.has_initial else None,
            dzxbcdt, dconv_weight, dconv_bias, *of_numbers(per_head, numbers), dD, dnorm_weight, dout_weight,
        )  # fmt: skip

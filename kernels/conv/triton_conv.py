"""The causal convolution on Triton kernels as one differentiable operator, `longstate::causal_conv1d`."""

from typing import Any

import torch
import triton
from torch import Tensor

from kernels.conv.triton_backward import conv_backward_kernel
from kernels.conv.triton_forward import conv_forward_kernel
from kernels.conv.triton_rows import segment_table
from kernels.triton_support import on_device
from kernels.tuning import Config, bucket, pick

MAX_WIDTH = 16  # no tile and no segment is shorter
FORWARD_CONFIGS = (
    Config(num_warps=1, meta={"SEGMENT": 64, "GROUP": 8, "BLOCK_C": 128}),
    Config(num_warps=1, meta={"SEGMENT": 32, "GROUP": 4, "BLOCK_C": 256}),
    Config(num_warps=1, meta={"SEGMENT": 32, "GROUP": 8, "BLOCK_C": 128}),
)
BACKWARD_CONFIGS = (
    Config(num_warps=4, meta={"SEGMENT": 64, "GROUP": 8, "ROWS": 4, "BLOCK_C": 128}),
    Config(num_warps=4, meta={"SEGMENT": 64, "GROUP": 8, "ROWS": 8, "BLOCK_C": 64}),
    Config(num_warps=4, meta={"SEGMENT": 64, "GROUP": 2, "ROWS": 4, "BLOCK_C": 64}),
)


def triton_causal_conv1d(
    x: Tensor,
    before: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: bool,
) -> tuple[Tensor, Tensor]:
    """y (B, T, C) and the final states (rows, W - 1, C); before: (rows, W - 1, C), None for zeros.

    rows: B, or the sequences of cu_seqlens (S + 1,) in a batch of 1. Else as `kernels.conv.causal_conv1d`.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}: the Triton convolution takes float32, bfloat16 and float16")
    if weight.shape[1] > MAX_WIDTH:
        raise ValueError(
            f"weight has width {weight.shape[1]}: the Triton convolution takes at most {MAX_WIDTH}"
        )
    return _forward(x, before, weight, bias, starts, cu_seqlens, activation)


def launch_forward(
    x: Tensor,
    before: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: bool,
) -> tuple[Tensor, Tensor]:
    """y and the final states, as `triton_causal_conv1d`; no operator, for another operator to call."""
    x = _dense_channels(x)
    (batch, length, channels), width = x.shape, weight.shape[1]
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    y, tail = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(rows, width - 1, channels)
    settings = _settings("conv_forward", FORWARD_CONFIGS, x, weight)
    table, segments, per_row = _segments(x, cu_seqlens, settings["SEGMENT"])
    with on_device(x):
        conv_forward_kernel[((segments + rows) * triton.cdiv(channels, settings["BLOCK_C"]),)](
            x, weight, bias, _dense(before), _bytes(starts), table, cu_seqlens, y, tail,
            *x.stride()[:2], *weight.stride(), length, segments, per_row, channels,
            W=width, BIAS=bias is not None, BEFORE=before is not None, STARTS=starts is not None,
            ACTIVATION=activation, PACKED=cu_seqlens is not None, EVEN=channels % settings["BLOCK_C"] == 0,
            **settings,
        )  # fmt: skip
    return y, tail


def launch_backward(
    dy: Tensor,
    dtail: Tensor | None,
    x: Tensor,
    before: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: bool,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dbefore, dweight, dbias; empty for what was None. No operator, for another operator to call.

    dx: where to write it, of x's shape with channels side by side, such as a slice of a wider gradient.
    """
    x, dy = _dense_channels(x), _dense_channels(dy)
    channels, width = weight.shape
    if dx is None:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.shape != x.shape or dx.stride(-1) != 1:
        raise ValueError(
            f"dx has shape {tuple(dx.shape)} and strides {dx.stride()}: it needs x's shape "
            f"{tuple(x.shape)}, and channels side by side"
        )
    settings = _settings("conv_backward", BACKWARD_CONFIGS, x, weight)
    table, segments, per_row = _segments(x, cu_seqlens, settings["SEGMENT"])
    programs = triton.cdiv(segments, settings["ROWS"])
    dbefore = _empty_like(x, before)
    partial = x.new_empty(programs, width + 1, channels, dtype=torch.float32)
    with on_device(x):
        conv_backward_kernel[(programs * triton.cdiv(channels, settings["BLOCK_C"]),)](
            dy, _dense(dtail), x, weight, bias, _dense(before), _bytes(starts), table, dx, dbefore, partial,
            *dy.stride()[:2], *x.stride()[:2], *dx.stride()[:2], *weight.stride(),
            x.shape[1], segments, per_row, channels,
            W=width, BIAS=bias is not None, BEFORE=before is not None, STARTS=starts is not None,
            ACTIVATION=activation, DTAIL=dtail is not None, PACKED=cu_seqlens is not None,
            EVEN=channels % settings["BLOCK_C"] == 0, **settings,
        )  # fmt: skip
    sums = partial.sum(0)
    dweight = sums[:width].t().to(weight.dtype, copy=True, memory_format=torch.contiguous_format)
    return dx, dbefore, dweight, x.new_empty(0) if bias is None else sums[width].to(bias.dtype, copy=True)


@torch.library.custom_op("longstate::causal_conv1d", mutates_args=())
def _forward(
    x: Tensor,
    before: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: bool,
) -> tuple[Tensor, Tensor]:
    return launch_forward(x, before, weight, bias, starts, cu_seqlens, activation)


@_forward.register_fake
def _(
    x: Tensor,
    before: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: bool,
) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, x.new_empty(rows, weight.shape[1] - 1, x.shape[2])


@torch.library.custom_op("longstate::causal_conv1d_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dtail: Tensor | None,
    x: Tensor,
    before: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dbefore, dweight, dbias; empty for what was None."""
    return launch_backward(dy, dtail, x, before, weight, bias, starts, cu_seqlens, activation)


@_backward.register_fake
def _(
    dy: Tensor,
    dtail: Tensor | None,
    x: Tensor,
    before: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_like(x, x), _empty_like(x, before), _empty_like(x, weight), _empty_like(x, bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, dtail: Tensor | None) -> tuple[Tensor | None, ...]:
    x, before, weight, bias, starts, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    grads = _backward(dy, dtail, x, before, weight, bias, starts, cu_seqlens, ctx.activation)
    given = (x, before, weight, bias)
    return *(None if t is None else g for t, g in zip(given, grads, strict=True)), None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _settings(kernel: str, configs: tuple[Config, ...], x: Tensor, weight: Tensor) -> dict[str, Any]:
    key = {"C": x.shape[2], "W": weight.shape[1], "dtype": str(x.dtype)[6:]}
    return pick(kernel, configs, tokens=bucket(x.shape[0] * x.shape[1]), **key).settings()


def _segments(x: Tensor, cu_seqlens: Tensor | None, size: int) -> tuple[Tensor | None, int, int]:
    """The table of packed sequences, the number of segments, and that of one row of a batch."""
    if cu_seqlens is not None:
        table = segment_table(cu_seqlens, x.shape[1], size)
        return table, table.shape[1], 0
    per_row = triton.cdiv(x.shape[1], size)
    return None, x.shape[0] * per_row, per_row


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _dense_channels(t: Tensor) -> Tensor:
    """t itself if its channels lie side by side, as in a slice of in_proj's output; else a copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _bytes(starts: Tensor | None) -> Tensor | None:
    return None if starts is None else starts.contiguous().view(torch.uint8)


def _empty_like(x: Tensor, t: Tensor | None) -> Tensor:
    """A dense tensor of t's shape and dtype, or an empty one: an operator returns no None."""
    return x.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)

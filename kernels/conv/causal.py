"""Causal depthwise convolution as a sum of shifted, scaled copies, with its own backward.

Written token-major, (B, T, C), as in_proj leaves it, so nothing is transposed; in blocks that stay in the
cache, so that its many cheap passes do not go to memory. The convolution is recomputed in the backward pass:
only the input is kept. On the CPU, with a C compiler, the passes are compiled ones (`kernels.native`).
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.arguments import sequences
from kernels.native import conv as native

# Elements of one block: 1 MiB in fp32, measured best of 2^15 to 2^22.
BLOCK_ELEMENTS = 2**18


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: bool = True,
    backend: Literal["torch", "triton"] | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = silu(bias + sum_k weight[:, k] x_{t - W + 1 + k}), accumulated in fp32.

    Args:
        x: (B, T, C). weight: (C, W). bias: (C,) or None.
        initial_state: (B, C, W - 1), the inputs before the first token, oldest first; None for zeros.
        document_starts: (B, T) bool; a True token and those after it see nothing before it.
        cu_seqlens: (S + 1,) int32 or int64, borders of sequences packed into one row (B = 1), from 0 to T;
            states are then (S, C, W - 1), one a sequence. On a GPU its values are not checked.
        activation: apply SiLU.
        backend: None for Triton kernels on a GPU, PyTorch elsewhere.

    Returns:
        y (B, T, C) and the final state (B, C, W - 1), both in x's dtype. Inputs before the last document
        start are zero in the final state, so a following piece needs no memory of where documents began.

    Raises:
        ValueError: for shapes that do not fit, naming the argument.
    """
    batch, length, channels = x.shape
    width = weight.shape[1]
    if weight.shape[0] != channels or width < 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected ({channels}, W) with W >= 2")
    rows = batch if cu_seqlens is None else _check_packing(x, cu_seqlens)
    expected = (rows, channels, width - 1)
    if initial_state is not None and tuple(initial_state.shape) != expected:
        raise ValueError(f"initial_state has shape {tuple(initial_state.shape)}: expected {expected}")
    if document_starts is not None and tuple(document_starts.shape) != (batch, length):
        raise ValueError(
            f"document_starts has shape {tuple(document_starts.shape)}: expected {(batch, length)}"
        )
    if (backend or ("triton" if x.is_cuda else "torch")) == "triton":
        from kernels.conv.triton_conv import triton_causal_conv1d  # imports triton

        before = None if initial_state is None else initial_state.transpose(1, 2).to(x.dtype)
        y, tail = triton_causal_conv1d(x, before, weight, bias, document_starts, cu_seqlens, activation)
        return y, tail.transpose(1, 2)
    if initial_state is None:
        initial_state = x.new_zeros(expected)
    if cu_seqlens is not None:
        return _packed(x, weight, bias, initial_state, document_starts, cu_seqlens, activation)
    before = initial_state.transpose(1, 2).to(x.dtype)
    tail = torch.cat([before, x[:, 1 - width :]], dim=1)[:, 1 - width :]
    if document_starts is not None:
        tail = tail * _same_document_as_last(document_starts, width - 1).to(x.dtype)
    y = _CausalConv.apply(x, before, weight, bias, document_starts, activation)
    return y, tail.transpose(1, 2).contiguous()


def _check_packing(x: Tensor, cu_seqlens: Tensor) -> int:
    """The number of packed sequences."""
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        given = f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        raise ValueError(f"{given}: expected int32 or int64 of shape (S + 1,) with S >= 1")
    if len(x) != 1:
        raise ValueError(f"x has {len(x)} rows: cu_seqlens packs sequences into one row")
    if not cu_seqlens.is_cuda:
        sequences(cu_seqlens, x.shape[1])
    return len(cu_seqlens) - 1


def _packed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor,
    document_starts: Tensor | None,
    cu_seqlens: Tensor,
    activation: bool,
) -> tuple[Tensor, Tensor]:
    """One sequence after another."""
    pieces = [
        causal_conv1d(
            x[:, start:stop],
            weight,
            bias,
            initial_state=initial_states[row : row + 1],
            document_starts=None if document_starts is None else document_starts[:, start:stop],
            activation=activation,
        )
        for row, (start, stop) in enumerate(sequences(cu_seqlens, x.shape[1]))
    ]
    outputs, states = zip(*pieces, strict=True)
    return torch.cat(outputs, dim=1), torch.cat(states)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        before: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        starts: Tensor | None,
        activation: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, before, weight, bias, starts)
        ctx.activation = activation
        if native.takes(x, before, weight, bias):
            return native.forward(x, before, weight, bias, starts, activation)
        conv = _Convolution(x, before, weight, bias, starts)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for rows, times in _blocks(x):
            total = conv.sums(conv.inputs(rows, times), rows, times)
            y[rows, times] = F.silu(total, inplace=True) if activation else total
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, before, weight, bias, starts = ctx.saved_tensors
        if native.takes(x, before, weight, bias):
            dx, dbefore, dweight, of_bias = native.backward(
                dy, x, before, weight, bias, starts, ctx.activation
            )
            rounded = None if bias is None else of_bias.to(bias.dtype)
            return dx, dbefore, dweight.to(weight.dtype), rounded, None, None
        conv = _Convolution(x, before, weight, bias, starts)
        dx, dbefore = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, before))
        dtaps, dbias = torch.zeros_like(conv.taps), torch.zeros_like(conv.taps[0])
        reading = dy.new_empty(0)
        for rows, times in reversed(list(_blocks(x))):
            inputs, length = conv.inputs(rows, times), times.stop - times.start
            # the sums that read these inputs: those of this block and the first of the block after it
            after = reading[:, : conv.lags] if times.stop < x.shape[1] else 0.0
            reading = inputs.new_empty(inputs.shape)
            reading[:, length:] = after
            d, dy_block = reading[:, :length], dy[rows, times].float()
            if ctx.activation:
                sums = conv.sums(inputs, rows, times)
                torch.ops.aten.silu_backward.grad_input(dy_block, sums, grad_input=d)
            else:
                d.copy_(dy_block)
            conv.accumulate(d, inputs, rows, times, dtaps, dbias)
            dx[rows, times] = conv.transposed(reading, rows, times)
            if times.start == 0:
                reading = F.pad(reading[:, : conv.lags], (0, 0, conv.lags, 0))
                dbefore[rows] = conv.transposed(reading, rows, slice(-conv.lags, 0))
        return (
            dx,
            dbefore,
            dtaps.t().to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            None,
            None,
        )


class _Convolution:
    """The convolution of x (B, T, C) after `before` (B, W - 1, C), evaluated a block at a time in fp32."""

    def __init__(
        self, x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None
    ) -> None:
        self.x, self.before = x, before
        self.taps = weight.float().t().contiguous()  # (W, C)
        self.bias = torch.zeros_like(self.taps[0]) if bias is None else bias.float()
        self.lags = weight.shape[1] - 1
        self.visible = _visible(starts, self.lags)

    def inputs(self, rows: slice, times: slice) -> Tensor:
        """Everything that the sums of `times` read, (b, t + W - 1, C)."""
        if times.start >= self.lags:
            return self.x[rows, times.start - self.lags : times.stop].float()
        known = torch.cat([self.before[rows], self.x[rows, : times.stop]], dim=1)
        return known[:, times.start :].float()

    def sums(self, inputs: Tensor, rows: slice, times: slice) -> Tensor:
        """bias + sum over the taps, (b, t, C)."""
        length = times.stop - times.start
        total = torch.addcmul(self.bias, inputs[:, self.lags :], self.taps[-1])
        for k in range(self.lags):
            total.addcmul_(self._masked(inputs[:, k : k + length], k, rows, times.start), self.taps[k])
        return total

    def transposed(self, d: Tensor, rows: slice, times: slice) -> Tensor:
        """Gradient of the inputs at `times` from d (b, t + W - 1, C), the gradient of the sums from there."""
        length = times.stop - times.start
        total = d[:, :length] * self.taps[-1]
        for k in range(self.lags):
            lag = self.lags - k
            masked = self._masked(d[:, lag : lag + length], k, rows, times.start + lag)
            total.addcmul_(masked, self.taps[k])
        return total

    def accumulate(
        self, d: Tensor, inputs: Tensor, rows: slice, times: slice, dtaps: Tensor, dbias: Tensor
    ) -> None:
        """Add the share of the sums at `times` to the gradients of taps and bias."""
        dbias += d.sum((0, 1))
        product = torch.empty_like(d)
        for k in range(self.lags + 1):
            torch.mul(self._masked(d, k, rows, times.start), inputs[:, k : k + d.shape[1]], out=product)
            dtaps[k] += product.sum((0, 1))

    def _masked(self, t: Tensor, k: int, rows: slice, start: int) -> Tensor:
        """t (b, t, C) where tap k of the tokens from `start` on is visible."""
        if self.visible is None or k == self.lags:
            return t
        first = start + self.lags
        return t * self.visible[k][rows, first : first + t.shape[1]]


def _blocks(t: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut (B, T, C) into blocks of whole rows, or of one row's tokens where a row is too long."""
    batch, length, channels = t.shape
    tokens = max(1, BLOCK_ELEMENTS // channels)
    rows, times = max(1, tokens // length), min(tokens, length)
    for row in range(0, batch, rows):
        for time in range(0, length, times):
            yield slice(row, min(row + rows, batch)), slice(time, min(time + times, length))


def _visible(starts: Tensor | None, lags: int) -> list[Tensor] | None:
    """For each tap but the last, (B, lags + T + lags, 1) fp32: 1 where the token `lags - k` earlier is of
    the same document. The margins let tokens just outside the sequence be asked for too."""
    if starts is None:
        return None
    documents = F.pad(starts.int(), (lags, 0)).cumsum(1)
    same = [documents[:, k : k + starts.shape[1]] == documents[:, lags:] for k in range(lags)]
    return [F.pad(tap.float(), (lags, lags))[..., None] for tap in same]


def _same_document_as_last(starts: Tensor, count: int) -> Tensor:
    """(B, count, 1) bool: which of the last `count` inputs belong to the last token's document."""
    documents = F.pad(starts.int(), (count, 0)).cumsum(1)
    return (documents[:, -count:] == documents[:, -1:])[..., None]

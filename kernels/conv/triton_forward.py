"""Forward kernel of the causal convolution: a tile of tokens and channels a program, taps from shifted loads.

Neighbouring taps hit the L1 cache: memory sees x and y once. The last programs write the final states.
"""

# mypy: allow-incomplete-defs
import triton
import triton.language as tl

from kernels.conv.triton_rows import locate


@triton.jit
def _sums(
    x, weight, bias, before, starts, table, y, stride_x_b, stride_x_t, stride_w_c, stride_w_k,
    segment, T, n_segments, per_row, c, C,
    W: tl.constexpr, BIAS: tl.constexpr, BEFORE: tl.constexpr, STARTS: tl.constexpr, ACTIVATION: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y of a segment of BLOCK_T tokens."""
    batch, row, start, begin, end, first = locate(segment, table, n_segments, per_row, T, BLOCK_T, PACKED)
    t, channel = start + tl.arange(0, BLOCK_T), (c < C)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    if BIAS:
        total += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    visible = t < end
    for lag in tl.static_range(W):
        if STARTS and lag > 0:
            begun = t - lag + 1
            visible = visible & (
                tl.load(starts + batch * T + begun, mask=(begun >= begin) & (t < end), other=0) == 0
            )
        v = _inputs(
            x + batch * stride_x_b, before, row, t - lag, begin, c, C, stride_x_t, visible[:, None] & channel,
            first, W, BEFORE,
        )  # fmt: skip
        w = tl.load(weight + c * stride_w_c + (W - 1 - lag) * stride_w_k, mask=c < C, other=0.0)
        total += v * w.to(tl.float32)[None, :]
    if ACTIVATION:
        total = total * tl.sigmoid(total)
    place = (batch * T + t)[:, None] * C + c[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=(t < end)[:, None] & channel)


@triton.jit
def _final_state(
    x, before, starts, cu_seqlens, tail, stride_x_b, stride_x_t, row, T, c, C,
    W: tl.constexpr, BEFORE: tl.constexpr, STARTS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The last W - 1 inputs of a row, those of earlier documents zero."""
    batch, begin, end = row, row * 0, row * 0 + T
    if PACKED:
        batch = row * 0
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + row).to(tl.int64), 0), T)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + row + 1).to(tl.int64), 0), T)
    channel = (c < C)[None, :]
    visible = end >= 0
    for lag in tl.static_range(1, W):
        if STARTS and lag > 1:
            begun = end - lag + 1
            visible = visible & (tl.load(starts + batch * T + begun, mask=begun >= begin, other=0) == 0)
        v = _inputs(
            x + batch * stride_x_b, before, row, end - lag + tl.arange(0, 1), begin, c, C, stride_x_t,
            visible & channel, True, W, BEFORE,
        )  # fmt: skip
        place = (row * (W - 1) + W - 1 - lag) * C + c[None, :]
        tl.store(tail + place, v.to(tail.dtype.element_ty), mask=channel)


@triton.jit
def _inputs(
    x, before, row, position, begin, c, C, stride_t, seen, first, W: tl.constexpr, BEFORE: tl.constexpr
):  # fmt: skip
    """Inputs (t, c) at `position` (t,) in fp32 where `seen` (t, c): of x from the row's `begin` on, earlier
    ones of its state, which is looked at only if `first`."""
    inside = (position >= begin)[:, None]
    v = tl.load(x + position[:, None] * stride_t + c[None, :], mask=seen & inside, other=0.0).to(tl.float32)
    if BEFORE:  # noqa: SIM102  (known when compiling, `first` when running)
        if first:
            place = ((row + 1) * (W - 1) + position - begin)[:, None] * C + c[None, :]
            v += tl.load(before + place, mask=seen & ~inside, other=0.0).to(tl.float32)
    return v


@triton.jit(do_not_specialize=["T", "n_segments", "per_row"])
def conv_forward_kernel(
    x, weight, bias, before, starts, table, cu_seqlens, y, tail,
    stride_x_b, stride_x_t, stride_w_c, stride_w_k,
    T, n_segments, per_row, C,
    W: tl.constexpr, BIAS: tl.constexpr, BEFORE: tl.constexpr, STARTS: tl.constexpr, ACTIVATION: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of channels, fastest, of the segments, then of the rows' final states (rows, W - 1, C)."""
    blocks = tl.cdiv(C, BLOCK_C)
    segment = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    if segment < n_segments:
        _sums(
            x, weight, bias, before, starts, table, y, stride_x_b, stride_x_t, stride_w_c, stride_w_k,
            segment, T, n_segments, per_row, c, C,
            W, BIAS, BEFORE, STARTS, ACTIVATION, PACKED, BLOCK_T, BLOCK_C,
        )  # fmt: skip
    else:
        _final_state(
            x, before, starts, cu_seqlens, tail, stride_x_b, stride_x_t, segment - n_segments, T, c, C,
            W, BEFORE, STARTS, PACKED,
        )  # fmt: skip

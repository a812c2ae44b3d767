"""Forward kernel of the causal convolution: each program walks along a segment, its last inputs in registers.

Every input is loaded and converted once, GROUP tokens ahead of its use. A segment inside one row and one
document is walked without masks. The last programs of the grid write the final states.
"""

# ruff: noqa: RUF005  (Triton knows no unpacking)
# mypy: ignore-errors
import triton
import triton.language as tl

from kernels.conv.triton_rows import locate
from kernels.conv.triton_step import load, sigmoid, store


@triton.jit
def _walk(
    now, window, age, taps, b, x_row, y_row, flags, stride_x_t, left, channel, C,
    W: tl.constexpr, STARTS: tl.constexpr, ACTIVATION: tl.constexpr, PLAIN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """y of `left` tokens. now: the first GROUP inputs; window: the W - 1 before them, fp32.

    age: tokens since the document began; an input `lag` tokens earlier is of the same document if age >= lag.
    PLAIN: every input is, and GROUP divides `left`.
    """
    STEP: tl.constexpr = len(now) if PLAIN else 1
    for base in range(0, left, STEP):
        for u in tl.static_range(STEP):
            i = base + u
            here = base + len(now) < left  # a plain segment's last steps have nothing to load
            window = window + (now[0].to(tl.float32),)
            later = x_row + tl.cast(i + len(now), tl.int64) * stride_x_t
            now = now[1:] + (load(later, here, channel, False, EVEN),)
            if STARTS and not PLAIN:
                age = tl.where(tl.load(flags + i, mask=i < left, other=0) != 0, 0, age + 1)
            total = b
            for k in tl.static_range(W):
                v = window[k]
                if STARTS and not PLAIN and k < W - 1:
                    v = tl.where(age >= W - 1 - k, v, 0.0)
                total += v * taps[k]
            if ACTIVATION:
                total = total * sigmoid(total)
            window = window[1:]
            store(y_row + tl.cast(i, tl.int64) * C, total, i < left, channel, PLAIN, EVEN)


@triton.jit
def _segment(
    x, weight, bias, before, starts, table, y, stride_x_b, stride_x_t, stride_w_c, stride_w_k,
    segment, T, n_segments, per_row, c, C,
    W: tl.constexpr, BIAS: tl.constexpr, BEFORE: tl.constexpr, STARTS: tl.constexpr, ACTIVATION: tl.constexpr,
    PACKED: tl.constexpr, EVEN: tl.constexpr,
    SEGMENT: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y of a segment."""
    batch, row, start, _, end, first = locate(segment, table, n_segments, per_row, T, SEGMENT, PACKED)
    channel = c < C
    x_row = x + batch * stride_x_b + start * stride_x_t + c
    y_row = y + (batch * T + start) * C + c
    flags = batch
    if STARTS:
        flags = starts + batch * T + start
    left = tl.minimum(end - start, SEGMENT).to(tl.int32)
    known = (left > 0) & (first == 0)  # the inputs before the segment are x's

    b = tl.zeros((BLOCK_C,), tl.float32)
    if BIAS:
        b += load(bias + c, True, channel, True, EVEN).to(tl.float32)
    taps = (b,)[:0]
    now = taps
    window = taps
    for u in tl.static_range(GROUP):
        now = now + (load(x_row + tl.cast(u, tl.int64) * stride_x_t, u < left, channel, False, EVEN),)
    age = left * 0 + W
    for j in tl.static_range(W - 1):
        back = W - 1 - j
        v = load(x_row - tl.cast(back, tl.int64) * stride_x_t, known, channel, False, EVEN).to(tl.float32)
        if BEFORE:  # noqa: SIM102  (known when compiling, `first` when running)
            if first:
                state = before + (row * (W - 1) + j) * C + c
                v += load(state, left > 0, channel, False, EVEN).to(tl.float32)
        window = window + (v,)
        if STARTS:
            age = tl.where(tl.load(flags - back, mask=known, other=0) != 0, 0, age + 1)
    plain = known & (left == SEGMENT)
    if STARTS:
        i = tl.arange(0, SEGMENT)
        began = tl.max(tl.load(flags + i, mask=i < left, other=0).to(tl.int32), 0)
        plain = plain & (began == 0) & (age >= W)
    for k in tl.static_range(W):
        w = weight + c * stride_w_c + k * stride_w_k
        taps = taps + (load(w, True, channel, True, EVEN).to(tl.float32),)
    if plain:
        _walk(
            now, window, age, taps, b, x_row, y_row, flags, stride_x_t, SEGMENT, channel, C,
            W, STARTS, ACTIVATION, True, EVEN,
        )  # fmt: skip
    else:
        _walk(
            now, window, age, taps, b, x_row, y_row, flags, stride_x_t, left, channel, C,
            W, STARTS, ACTIVATION, False, EVEN,
        )  # fmt: skip


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
    channel = c < C
    seen = end >= 0
    for lag in tl.static_range(1, W):
        position = end - lag
        if STARTS and lag > 1:
            begun = position + 1
            seen = seen & (tl.load(starts + batch * T + begun, mask=begun >= begin, other=0) == 0)
        inside = position >= begin
        v = tl.load(
            x + batch * stride_x_b + position * stride_x_t + c, mask=channel & seen & inside, other=0.0
        )
        if BEFORE:
            state = before + ((row + 1) * (W - 1) + position - begin) * C + c
            v += tl.load(state, mask=channel & seen & (position < begin), other=0.0)
        tl.store(tail + (row * (W - 1) + W - 1 - lag) * C + c, v.to(tail.dtype.element_ty), mask=channel)


@triton.jit(do_not_specialize=["T", "n_segments", "per_row"])
def conv_forward_kernel(
    x, weight, bias, before, starts, table, cu_seqlens, y, tail,
    stride_x_b, stride_x_t, stride_w_c, stride_w_k,
    T, n_segments, per_row, C,
    W: tl.constexpr, BIAS: tl.constexpr, BEFORE: tl.constexpr, STARTS: tl.constexpr, ACTIVATION: tl.constexpr,
    PACKED: tl.constexpr, EVEN: tl.constexpr,
    SEGMENT: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of channels, fastest, of the segments, then of the rows' final states (rows, W - 1, C)."""
    blocks = tl.cdiv(C, BLOCK_C)
    segment = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    if segment < n_segments:
        _segment(
            x, weight, bias, before, starts, table, y, stride_x_b, stride_x_t, stride_w_c, stride_w_k,
            segment, T, n_segments, per_row, c, C,
            W, BIAS, BEFORE, STARTS, ACTIVATION, PACKED, EVEN, SEGMENT, GROUP, BLOCK_C,
        )  # fmt: skip
    else:
        _final_state(
            x, before, starts, cu_seqlens, tail, stride_x_b, stride_x_t, (segment - n_segments).to(tl.int64),
            T, c, C, W, BEFORE, STARTS, PACKED,
        )  # fmt: skip

"""Backward kernel of the causal convolution: each program walks along time with everything in registers.

At token t it knows the last W inputs (`window`), forms the sum and its gradient d_t once, adds d_t to the
gradients of the W inputs that the sum read (`pending`) and lets go of the oldest: x and dy are read once,
GROUP tokens ahead, dx written once. Segments inside one row and one document are walked without masks.
Weight and bias gradients are summed over the program's tokens; these partial sums are added outside, in a
fixed order.
"""

# ruff: noqa: RUF005  (Triton knows no unpacking)
# mypy: ignore-errors
import triton
import triton.language as tl

from kernels.conv.triton_rows import locate
from kernels.conv.triton_step import load, sigmoid, store


@triton.jit
def _step(window, pending, age, input, dy, begins, taps, b, STARTS: tl.constexpr, ACTIVATION: tl.constexpr):
    """One token: window and pending with this token's entry, its age, d, and the inputs its sum read.

    age: tokens since the document began; an input `lag` tokens earlier is of the same document if age >= lag.
    """
    W: tl.constexpr = len(taps)
    if STARTS:
        age = tl.where(begins != 0, 0, age + 1)
    window = window + (input,)
    read = window[:0]
    total = b
    for k in tl.static_range(W):
        v = window[k]
        if STARTS and k < W - 1:
            v = tl.where((age >= W - 1 - k)[:, None], v, 0.0)
        read = read + (v,)
        total += v * taps[k]
    d = dy
    if ACTIVATION:
        s = sigmoid(total)
        d = dy * (s + s * (total - total * s))
    pending = pending + (tl.zeros(input.shape, tl.float32),)
    gathered = pending[:0]
    for k in tl.static_range(W):
        share = d * taps[k]
        if STARTS and k < W - 1:
            share = tl.where((age >= W - 1 - k)[:, None], share, 0.0)
        gathered = gathered + (pending[k] + share,)
    return window, gathered, age, d, read


@triton.jit
def _walk(
    xs, dys, window, age, taps, b, x_row, dy_row, dx_row, flags, dtail, dbefore, states, out,
    stride_x_t, stride_dy_t, stride_dx_t, left, first, live, c, C,
    STARTS: tl.constexpr, ACTIVATION: tl.constexpr, BEFORE: tl.constexpr, DTAIL: tl.constexpr,
    PLAIN: tl.constexpr, EVEN: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """dx of ROWS segments, and the sums over their tokens, written to `out`.

    xs, dys: the first GROUP inputs and gradients; window: the W - 1 inputs before them, fp32.
    PLAIN: all tokens and the W - 1 that follow are of the rows and documents of all inputs.
    """
    W: tl.constexpr = len(taps)
    channel, cols = c < C, (c < C)[None, :]
    MASKS: tl.constexpr = STARTS and not PLAIN
    zero = tl.zeros(window[0].shape, tl.float32)
    sums = (zero,)  # of the bias, then of the taps
    pending = window[:0]
    for k in tl.static_range(W):
        sums = sums + (zero,)
        if k > 0:
            pending = pending + (zero,)

    STEP: tl.constexpr = len(xs) if PLAIN else 1
    for base in range(0, SEGMENT, STEP):
        for u in tl.static_range(STEP):
            i = base + u
            later = tl.cast(i + len(xs), tl.int64)
            here = base + len(xs) < SEGMENT if PLAIN else (i + len(xs) < left)[:, None]
            v, g = xs[0].to(tl.float32), dys[0].to(tl.float32)
            xs = xs[1:] + (load(x_row + later * stride_x_t, here, cols, False, EVEN),)
            dys = dys[1:] + (load(dy_row + later * stride_dy_t, here, cols, False, EVEN),)
            begins = age
            if MASKS:
                begins = tl.load(flags + i, mask=i < left, other=0).to(tl.int32)
            window, pending, age, d, read = _step(
                window, pending, age, v, g, begins, taps, b, MASKS, ACTIVATION
            )
            added = (sums[0] + d,)
            for k in tl.static_range(W):
                added = added + (sums[k + 1] + d * read[k],)
            sums = added
            oldest = pending[0]
            if DTAIL and not PLAIN:
                oldest += _of_tail(dtail, states, i - left, live, age, C, cols, W, MASKS)
            window, pending = window[1:], pending[1:]
            place = dx_row + tl.cast(i - (W - 1), tl.int64) * stride_dx_t
            if PLAIN:  # inputs before the segment are of another one
                store(place, oldest, i >= W - 1, cols, u >= W - 1, EVEN)
            else:
                store(place, oldest, ((i >= W - 1) & (i - (W - 1) < left))[:, None], cols, False, EVEN)
            if BEFORE and not PLAIN:
                store(dbefore + states + i * C, oldest, (first & (i < W - 1))[:, None], cols, False, EVEN)

    for j in tl.static_range(W - 1):  # sums of the tokens that follow, as far as they read this segment
        i = SEGMENT + j
        here = (i < left)[:, None]
        v = load(x_row + tl.cast(i, tl.int64) * stride_x_t, here, cols, PLAIN, EVEN)
        g = load(dy_row + tl.cast(i, tl.int64) * stride_dy_t, here, cols, PLAIN, EVEN)
        began = age
        if MASKS:
            began = tl.load(flags + i, mask=i < left, other=0).to(tl.int32)
        window, pending, age, d, read = _step(
            window, pending, age, v.to(tl.float32), g.to(tl.float32), began, taps, b, MASKS, ACTIVATION
        )  # fmt: skip
        oldest = pending[0]
        if DTAIL and not PLAIN:
            oldest += _of_tail(dtail, states, i - left, live, age, C, cols, W, MASKS)
        window, pending = window[1:], pending[1:]
        place = dx_row + tl.cast(i - (W - 1), tl.int64) * stride_dx_t
        store(place, oldest, (i - (W - 1) < left)[:, None], cols, PLAIN, EVEN)

    store(out + W * C, tl.sum(sums[0], 0), True, channel, True, EVEN)
    for k in tl.static_range(W):
        store(out + k * C, tl.sum(sums[k + 1], 0), True, channel, True, EVEN)


@triton.jit(do_not_specialize=["T", "n_segments", "per_row"])
def conv_backward_kernel(
    dy, dtail, x, weight, bias, before, starts, table, dx, dbefore, partial,
    stride_dy_b, stride_dy_t, stride_x_b, stride_x_t, stride_dx_b, stride_dx_t, stride_w_c, stride_w_k,
    T, n_segments, per_row, C,
    W: tl.constexpr, BIAS: tl.constexpr, BEFORE: tl.constexpr, STARTS: tl.constexpr, ACTIVATION: tl.constexpr,
    DTAIL: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr,
    SEGMENT: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """ROWS segments side by side, GROUP tokens loaded at a time. Grid: segments, blocks of channels fastest.

    partial (programs over segments, W + 1, C) fp32: gradients of the taps, then of the bias.
    dtail, dbefore (rows, W - 1, C).
    """
    blocks = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    channel, cols = c < C, (c < C)[None, :]
    segment = program * ROWS + tl.arange(0, ROWS)
    batch, row, start, _, end, first = locate(segment, table, n_segments, per_row, T, SEGMENT, PACKED)
    flags = batch
    if STARTS:
        flags = starts + batch * T + start
    x_row = x + (batch * stride_x_b + start * stride_x_t)[:, None] + c[None, :]
    dy_row = dy + (batch * stride_dy_b + start * stride_dy_t)[:, None] + c[None, :]
    dx_row = dx + (batch * stride_dx_b + start * stride_dx_t)[:, None] + c[None, :]
    states = (row * (W - 1) * C)[:, None] + c[None, :]
    left = tl.minimum(end - start, SEGMENT + W).to(tl.int32)  # tokens to the end of the row, if it is near
    live = (segment < n_segments) & (row >= 0)  # others fill up the grid: they have no row, nor its states
    known = (left > 0) & (first == 0)  # the inputs before the segment are x's

    b = tl.zeros((BLOCK_C,), tl.float32)
    if BIAS:
        b += load(bias + c, True, channel, True, EVEN).to(tl.float32)
    b = b[None, :] + tl.zeros((ROWS, BLOCK_C), tl.float32)
    window = (b,)[:0]
    xs = window
    dys = window
    taps = window
    for u in tl.static_range(GROUP):
        i = tl.cast(u, tl.int64)
        xs = xs + (load(x_row + i * stride_x_t, (u < left)[:, None], cols, False, EVEN),)
        dys = dys + (load(dy_row + i * stride_dy_t, (u < left)[:, None], cols, False, EVEN),)
    age = tl.full((ROWS,), W, tl.int32)
    for j in tl.static_range(W - 1):
        back = W - 1 - j
        v = load(x_row - tl.cast(back, tl.int64) * stride_x_t, known[:, None], cols, False, EVEN)
        v = v.to(tl.float32)
        if BEFORE:
            v += load(before + states + j * C, first[:, None], cols, False, EVEN).to(tl.float32)
        window = window + (v,)
        if STARTS:
            age = tl.where(tl.load(flags - back, mask=known, other=0) != 0, 0, age + 1)
    plain = live & known & (left >= SEGMENT + W - 1)
    if STARTS:
        i = tl.arange(0, 2 * SEGMENT)[None, :]
        near = (i < left[:, None]) & (i < SEGMENT + W - 1)
        began = tl.max(tl.load(flags[:, None] + i, mask=near, other=0).to(tl.int32), 1)
        plain = plain & (began == 0) & (age >= W)
    for k in tl.static_range(W):
        w = load(weight + c * stride_w_c + k * stride_w_k, True, channel, True, EVEN).to(tl.float32)
        taps = taps + (w[None, :],)
    out = partial + program.to(tl.int64) * (W + 1) * C + c
    if W <= 4 and tl.min(plain.to(tl.int32), 0) != 0:  # wider kernels take minutes to compile twice
        _walk(
            xs, dys, window, age, taps, b, x_row, dy_row, dx_row, flags, dtail, dbefore, states, out,
            stride_x_t, stride_dy_t, stride_dx_t, left, first, live, c, C,
            STARTS, ACTIVATION, BEFORE, DTAIL, True, EVEN, SEGMENT,
        )  # fmt: skip
    else:
        _walk(
            xs, dys, window, age, taps, b, x_row, dy_row, dx_row, flags, dtail, dbefore, states, out,
            stride_x_t, stride_dy_t, stride_dx_t, left, first, live, c, C,
            STARTS, ACTIVATION, BEFORE, DTAIL, False, EVEN, SEGMENT,
        )  # fmt: skip


@triton.jit
def _of_tail(dtail, states, past, live, age, C, cols, W: tl.constexpr, STARTS: tl.constexpr):
    """Gradient of the final state's entry that copied the input W - 1 tokens back.

    past: tokens past the row's end; no document begins there, so age tells whether one did after that input.
    live: there is a row.
    """
    copied = live & (past >= 0) & (past < W - 1)
    if STARTS:
        copied = copied & (age >= W - 1)
    return tl.load(
        dtail + states + (past.to(tl.int64) * C)[:, None], mask=copied[:, None] & cols, other=0.0
    ).to(tl.float32)

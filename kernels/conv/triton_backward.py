"""Backward kernel of the causal convolution: each program walks along time with everything in registers.

At token t it knows the last W inputs (`window`), forms the sum and its gradient d_t once, adds d_t to the
gradients of the W inputs that the sum read (`pending`) and lets go of the oldest: x and dy are read once, dx
written once. Weight and bias gradients are summed over the program's tokens; these partial sums are added
outside, in a fixed order.
"""

# ruff: noqa: RUF005  (Triton knows no unpacking)
# mypy: ignore-errors
import triton
import triton.language as tl

from kernels.conv.triton_rows import locate


@triton.jit
def step(window, pending, age, input, dy, begins, taps, b, STARTS: tl.constexpr, ACTIVATION: tl.constexpr):
    """One token: window and pending with this token's entry, its age, d, and the inputs its sum read.

    age: tokens since the document began; an input `lag` tokens earlier is of the same document if age >= lag.
    """
    W: tl.constexpr = len(taps)
    if STARTS:
        age = tl.where(begins != 0, 0, age + 1)
    window = window + (input,)
    read = window[:0]
    total = tl.zeros(input.shape, tl.float32) + b[None, :]
    for k in tl.static_range(W):
        v = window[k]
        if STARTS and k < W - 1:
            v = tl.where((age >= W - 1 - k)[:, None], v, 0.0)
        read = read + (v,)
        total += v * taps[k][None, :]
    d = dy
    if ACTIVATION:
        s = tl.sigmoid(total)
        d = dy * s * (1.0 + total * (1.0 - s))
    pending = pending + (tl.zeros(input.shape, tl.float32),)
    gathered = pending[:0]
    for k in tl.static_range(W):
        share = d * taps[k][None, :]
        if STARTS and k < W - 1:
            share = tl.where((age >= W - 1 - k)[:, None], share, 0.0)
        gathered = gathered + (pending[k] + share,)
    return window, gathered, age, d, read


@triton.jit(do_not_specialize=["T", "n_segments", "per_row"])
def conv_backward_kernel(
    dy, dtail, x, weight, bias, before, starts, table, dx, dbefore, partial,
    stride_dy_b, stride_dy_t, stride_x_b, stride_x_t, stride_dx_b, stride_dx_t, stride_w_c, stride_w_k,
    T, n_segments, per_row, C,
    W: tl.constexpr, BIAS: tl.constexpr, BEFORE: tl.constexpr, STARTS: tl.constexpr, ACTIVATION: tl.constexpr,
    DTAIL: tl.constexpr, PACKED: tl.constexpr,
    SEGMENT: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """ROWS segments side by side, GROUP tokens loaded at a time. Grid: segments, blocks of channels fastest.

    partial (programs over segments, W + 1, C) fp32: gradients of the taps, then of the bias.
    dtail, dbefore (rows, W - 1, C).
    """
    blocks = tl.cdiv(C, BLOCK_C)
    program = (tl.program_id(0) // blocks).to(tl.int64)
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
    left = end - start  # tokens to the end of the row
    live = (segment < n_segments) & (row >= 0)  # others fill up the grid: they have no row, nor its states

    zero = tl.zeros((ROWS, BLOCK_C), tl.float32)
    b = tl.zeros((BLOCK_C,), tl.float32)
    if BIAS:
        b = tl.load(bias + c, mask=channel, other=0.0).to(tl.float32)
    taps = (b,)[:0]
    sums = (zero,)  # of the bias, then of the taps
    for k in tl.static_range(W):
        taps = taps + (
            tl.load(weight + c * stride_w_c + k * stride_w_k, mask=channel, other=0.0).to(tl.float32),
        )
        sums = sums + (zero,)
    window = sums[:0]
    pending = sums[: W - 1]
    age = tl.full((ROWS,), W, tl.int32)
    for j in tl.static_range(W - 1):
        back = W - 1 - j
        known = ((left > 0) & ~first)[:, None] & cols
        v = tl.load(x_row - tl.cast(back, tl.int64) * stride_x_t, mask=known, other=0.0).to(tl.float32)
        if BEFORE:
            v += tl.load(before + states + j * C, mask=first[:, None] & cols, other=0.0).to(tl.float32)
        window = window + (v,)
        if STARTS:
            age = tl.where(tl.load(flags - back, mask=(left > 0) & ~first, other=0) != 0, 0, age + 1)

    for base in range(0, SEGMENT, GROUP):
        inputs = sums[:0]
        gradients = sums[:0]
        for u in tl.static_range(GROUP):
            known = (base + u < left)[:, None] & cols
            i = tl.cast(base, tl.int64) + u
            inputs = inputs + (tl.load(x_row + i * stride_x_t, mask=known, other=0.0),)
            gradients = gradients + (tl.load(dy_row + i * stride_dy_t, mask=known, other=0.0),)
        for u in tl.static_range(GROUP):
            i = tl.cast(base, tl.int64) + u
            begins = age
            if STARTS:
                begins = tl.load(flags + i, mask=i < left, other=0).to(tl.int32)
            window, pending, age, d, read = step(
                window, pending, age, inputs[u].to(tl.float32), gradients[u].to(tl.float32), begins, taps, b,
                STARTS, ACTIVATION,
            )  # fmt: skip
            added = (sums[0] + d,)
            for k in tl.static_range(W):
                added = added + (sums[k + 1] + d * read[k],)
            sums = added
            oldest = pending[0]
            if DTAIL:
                oldest += _of_tail(dtail, states, i - left, live, age, C, cols, W, STARTS)
            window, pending = window[1:], pending[1:]
            place = i - (W - 1)
            tl.store(
                dx_row + place * stride_dx_t, oldest.to(dx.dtype.element_ty),
                mask=((place >= 0) & (place < left))[:, None] & cols,
            )  # fmt: skip
            if BEFORE:
                tl.store(
                    dbefore + states + i * C, oldest.to(dbefore.dtype.element_ty),
                    mask=(first & (i < W - 1))[:, None] & cols,
                )  # fmt: skip

    for j in tl.static_range(W - 1):  # sums of the tokens that follow, as far as they read this segment
        i = tl.cast(SEGMENT + j, tl.int64)
        known = (i < left)[:, None] & cols
        v = tl.load(x_row + i * stride_x_t, mask=known, other=0.0).to(tl.float32)
        g = tl.load(dy_row + i * stride_dy_t, mask=known, other=0.0).to(tl.float32)
        begins = age
        if STARTS:
            begins = tl.load(flags + i, mask=i < left, other=0).to(tl.int32)
        window, pending, age, d, read = step(window, pending, age, v, g, begins, taps, b, STARTS, ACTIVATION)
        oldest = pending[0]
        if DTAIL:
            oldest += _of_tail(dtail, states, i - left, live, age, C, cols, W, STARTS)
        window, pending = window[1:], pending[1:]
        place = i - (W - 1)
        tl.store(
            dx_row + place * stride_dx_t, oldest.to(dx.dtype.element_ty), mask=(place < left)[:, None] & cols
        )

    out = partial + program * (W + 1) * C + c
    tl.store(out + W * C, tl.sum(sums[0], 0), mask=channel)
    for k in tl.static_range(W):
        tl.store(out + k * C, tl.sum(sums[k + 1], 0), mask=channel)


@triton.jit
def _of_tail(dtail, states, past, live, age, C, cols, W: tl.constexpr, STARTS: tl.constexpr):
    """Gradient of the final state's entry that copied the input W - 1 tokens back.

    past: tokens past the row's end; no document begins there, so age tells whether one did after that input.
    live: there is a row.
    """
    copied = live & (past >= 0) & (past < W - 1)
    if STARTS:
        copied = copied & (age >= W - 1)
    return tl.load(dtail + states + (past * C)[:, None], mask=copied[:, None] & cols, other=0.0).to(
        tl.float32
    )

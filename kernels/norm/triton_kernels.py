"""Kernels of RMSNorm, gated or not: ROWS tokens of one group of channels at a time, in fp32.

gate: 0 none, y = n(x) w; 1 after it, y = n(x silu(z)) w; 2 before it, y = n(x) w silu(z).
"""

# mypy: allow-incomplete-defs
import triton
import triton.language as tl


@triton.jit
def _load(pointer, row, stride, c, known):
    return tl.load(pointer + row[:, None] * stride + c[None, :], mask=known, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def norm_forward_kernel(
    x, z, weight, branch, total, y, inverse, stride_x, stride_z, stride_branch, eps, tokens, n_groups, size,
    GATE: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y (tokens, n_groups * size) and inverse (tokens, n_groups) fp32, the inverse root mean squares.

    ADD: x + branch stands for x, and is written to total, in whose dtype it is read on.
    """
    group = tl.program_id(0) % n_groups
    row = (tl.program_id(0) // n_groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    local = tl.arange(0, BLOCK)
    c = group * size + local
    known = (row < tokens)[:, None] & (local < size)[None, :]
    u = _load(x, row, stride_x, c, known)
    if ADD:
        added = (u + _load(branch, row, stride_branch, c, known)).to(total.dtype.element_ty)
        tl.store(total + row[:, None] * (n_groups * size) + c[None, :], added, mask=known)
        u = added.to(tl.float32)
    if GATE > 0:
        v = _load(z, row, stride_z, c, known)
        gate = v * tl.sigmoid(v)
        if GATE == 1:
            u = u * gate
    scale = 1.0 / tl.sqrt(tl.sum(u * u, 1) / size + eps)
    w = tl.load(weight + c, mask=local < size, other=0.0).to(tl.float32)
    out = u * scale[:, None] * w[None, :]
    if GATE == 2:
        out = out * gate
    tl.store(y + row[:, None] * (n_groups * size) + c[None, :], out.to(y.dtype.element_ty), mask=known)
    tl.store(inverse + row * n_groups + group, scale, mask=row < tokens)


@triton.jit(do_not_specialize=["tokens", "turns"])
def norm_backward_kernel(
    dy, x, z, weight, inverse, dtotal, dx, dz, dbranch, partial, y,
    stride_dy, stride_x, stride_z, stride_dtotal, stride_dz, tokens, turns, n_groups, size,
    GATE: tl.constexpr, TOTAL: tl.constexpr, BRANCH: tl.constexpr, AGAIN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx, dz (tokens, n_groups * size); partial (programs a group, n_groups * size) fp32: shares of dweight.

    A program takes `turns` times ROWS tokens that follow each other. AGAIN: y is written too, by the products
    of the forward kernel in their order. TOTAL: dtotal, another gradient of x, is added to dx.
    BRANCH: dx is written to dbranch too, in its dtype.
    """
    group = tl.program_id(0) % n_groups
    program = (tl.program_id(0) // n_groups).to(tl.int64)
    local, channels = tl.arange(0, BLOCK), n_groups * size
    c, channel = group * size + local, local < size
    w = tl.load(weight + c, mask=channel, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    for turn in range(0, turns):
        row = (program * turns + turn) * ROWS + tl.arange(0, ROWS)
        known = (row < tokens)[:, None] & channel[None, :]
        d, v = _load(dy, row, stride_dy, c, known), _load(x, row, stride_x, c, known)
        scale = tl.load(inverse + row * n_groups + group, mask=row < tokens, other=0.0)[:, None]
        if GATE == 0:
            n, dn = v * scale, d * w
            out = n * w
            dweight += d * n
            dv = scale * (dn - n * (tl.sum(dn * n, 1) / size)[:, None])
        else:
            t = _load(z, row, stride_z, c, known)
            s = tl.sigmoid(t)
            gate = t * s
            if GATE == 1:
                n, dn = v * gate * scale, d * w
                out = n * w
                dweight += d * n
                du = scale * (dn - n * (tl.sum(dn * n, 1) / size)[:, None])
                dv, dgate = du * gate, du * v
            else:
                n = v * scale
                out = n * w * gate
                dweight += d * n * gate
                dn = d * gate * w
                dv = scale * (dn - n * (tl.sum(dn * n, 1) / size)[:, None])
                dgate = d * n * w
            dt = dgate * (s + gate * (1.0 - s))
            tl.store(dz + row[:, None] * stride_dz + c[None, :], dt.to(dz.dtype.element_ty), mask=known)
        if TOTAL:
            dv += _load(dtotal, row, stride_dtotal, c, known)
        if BRANCH:
            at = dbranch + row[:, None] * channels + c[None, :]
            tl.store(at, dv.to(dbranch.dtype.element_ty), mask=known)
        tl.store(dx + row[:, None] * channels + c[None, :], dv.to(dx.dtype.element_ty), mask=known)
        if AGAIN:
            tl.store(y + row[:, None] * channels + c[None, :], out.to(y.dtype.element_ty), mask=known)
    tl.store(partial + program * channels + c, tl.sum(dweight, 0), mask=channel)

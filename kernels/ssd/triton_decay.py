# mypy: disable-error-code="no-untyped-def"
"""dt -> what the scan kernels read of it: chunk sums of log decays and insertion weights, one pass each way.

    base = clamp(softplus(dt + dt_bias), limit)     a = log_alpha + rate * base      w = weight * base

with `rate`, `log_alpha` and `weight` one number a head: A and the factors of a mitigation, multiplied out
by the caller. Sums run within chunks of Q tokens from each row's first token, in base 2, and are laid out
(B, H, T) so that a chunk of one head is contiguous. RAW takes log decays and weights that are given.
"""

import triton
import triton.language as tl

from kernels.ssd.triton_rows import chunk_of
from kernels.triton_support import softplus

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(base, batch, t, h, stride_b, stride_t, stride_h, known):
    """(Q, H) fp32 of a (B, T, H) tensor; zero where not known."""
    place = base + batch * stride_b + t[:, None] * stride_t + h[None, :] * stride_h
    return tl.load(place, mask=known, other=0.0).to(tl.float32)


@triton.jit
def _base(
    dt, bias, h, mask_h, low, high, SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """base (Q, H) of dt (Q, H), and its derivative by dt."""
    v = dt
    if BIAS:
        v = dt + tl.load(bias + h, mask=mask_h, other=0.0).to(tl.float32)[None, :]
    base, slope = v, tl.full(v.shape, 1.0, tl.float32)
    if SOFTPLUS:
        base, slope = softplus(v), tl.sigmoid(v)
    if LIMIT:
        slope = tl.where((base < low) | (base > high), 0.0, slope)
        base = tl.minimum(tl.maximum(base, low), high)
    return base, slope


@triton.jit(do_not_specialize=["T", "chunks", "n_slots"])
def decay_sums_kernel(
    dt, bias, rate, log_alpha, weight, insert, slots, sums, inserts,
    stride_dt_b, stride_dt_t, stride_dt_h, stride_in_b, stride_in_t, stride_in_h,
    low, high, T, chunks, n_slots, H,
    Q: tl.constexpr, BLOCK_H: tl.constexpr, RAW: tl.constexpr, SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr,
    BIAS: tl.constexpr, ALPHA: tl.constexpr, WEIGHT: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """One chunk of BLOCK_H heads. RAW: dt holds log decays, insert the weights."""
    slot, block = tl.program_id(0) // tl.cdiv(H, BLOCK_H), tl.program_id(0) % tl.cdiv(H, BLOCK_H)
    batch, start, end = chunk_of(slot, slots, T, 0, chunks, n_slots, Q, VARLEN)
    if start >= end:
        return
    t, h = start + tl.arange(0, Q), block * BLOCK_H + tl.arange(0, BLOCK_H)
    known, mask_h = (t < end)[:, None] & (h < H)[None, :], h < H
    v = _tile(dt, batch, t, h, stride_dt_b, stride_dt_t, stride_dt_h, known)
    if RAW:
        a = v
        w = _tile(insert, batch, t, h, stride_in_b, stride_in_t, stride_in_h, known)
    else:
        w, _ = _base(v, bias, h, mask_h, low, high, SOFTPLUS, LIMIT, BIAS)
        a = w * tl.load(rate + h, mask=mask_h, other=0.0)[None, :]
        if ALPHA:
            a += tl.load(log_alpha + h, mask=mask_h, other=0.0)[None, :]
        if WEIGHT:
            w = w * tl.load(weight + h, mask=mask_h, other=0.0)[None, :]
    s = tl.cumsum(tl.where(known, a, 0.0), 0) * LOG2_E
    place = (batch * H + h[None, :]) * T + t[:, None]
    tl.store(sums + place, s, mask=known)
    tl.store(inserts + place, w, mask=known)


@triton.jit(do_not_specialize=["T", "chunks", "n_slots"])
def decay_sums_backward_kernel(
    dt, bias, rate, weight, slots, dsums, dinserts, more, ddt, dinsert, partial,
    stride_dt_b, stride_dt_t, stride_dt_h, stride_ddt_b, stride_ddt_t,
    low, high, T, chunks, n_slots, H,
    Q: tl.constexpr, BLOCK_H: tl.constexpr, RAW: tl.constexpr, SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr,
    BIAS: tl.constexpr, WEIGHT: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """ddt (B, T, H), heads side by side, and, per chunk, what the per-head numbers gather: partial
    (slots, 4, H) for rate, log_alpha, weight, bias. dsums: gradient of the chunk sums in natural units; more
    (B, H, T) or None: that of log decays, beside it. RAW: ddt and dinsert are theirs directly.
    """
    slot, block = tl.program_id(0) // tl.cdiv(H, BLOCK_H), tl.program_id(0) % tl.cdiv(H, BLOCK_H)
    batch, start, end = chunk_of(slot, slots, T, 0, chunks, n_slots, Q, VARLEN)
    t, h = start + tl.arange(0, Q), block * BLOCK_H + tl.arange(0, BLOCK_H)
    known, mask_h = (t < end)[:, None] & (h < H)[None, :], h < H
    place = (batch * H + h[None, :]) * T + t[:, None]
    ds = tl.load(dsums + place, mask=known, other=0.0)
    dw = tl.load(dinserts + place, mask=known, other=0.0)
    da = tl.cumsum(ds, 0, reverse=True)
    if more is not None:
        da += tl.load(more + place, mask=known, other=0.0)
    out = batch * stride_ddt_b + t[:, None] * stride_ddt_t + h[None, :]
    if RAW:
        tl.store(ddt + out, da, mask=known)
        tl.store(dinsert + (batch * T + t[:, None]) * H + h[None, :], dw, mask=known)
    else:
        v = _tile(dt, batch, t, h, stride_dt_b, stride_dt_t, stride_dt_h, known)
        base, slope = _base(v, bias, h, mask_h, low, high, SOFTPLUS, LIMIT, BIAS)
        dbase = da * tl.load(rate + h, mask=mask_h, other=0.0)[None, :]
        if WEIGHT:
            dbase += dw * tl.load(weight + h, mask=mask_h, other=0.0)[None, :]
        else:
            dbase += dw
        dv = tl.where(known, dbase * slope, 0.0)
        tl.store(ddt + out, dv.to(ddt.dtype.element_ty), mask=known)
        row = partial + slot.to(tl.int64) * 4 * H + h
        tl.store(row, tl.sum(da * base, 0), mask=mask_h)
        tl.store(row + H, tl.sum(da, 0), mask=mask_h)
        tl.store(row + 2 * H, tl.sum(dw * base, 0), mask=mask_h)
        tl.store(row + 3 * H, tl.sum(dv, 0), mask=mask_h)

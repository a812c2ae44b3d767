# mypy: disable-error-code="no-untyped-def"
"""The decays of a sliding window: how much of a token lasts to the end of its block, and of what is before
the block to a token. Blocks are the `window` tokens from 0, window, 2 window, ... of a row.

    keeps_i = e^{D_i}, D_i the log decays after i to the end of its block; 0 for its first token
    reaches_t = e^{E_t}, E_t the log decays of its block through t; 0 for its last token

Both are 0 where a document begins in between and where there is no block after or before. Log decays are
differences of chunk sums (`triton_decay`): what fp32 rounds there does not add up from token to token.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_support import INTERPRET

BLOCK_T = 128 if INTERPRET else 1024


@triton.jit
def _log_decays(sums, t, known, Q: tl.constexpr):
    """Of tokens t, from sums within chunks of Q in base 2."""
    s = tl.load(sums + t, mask=known, other=0.0)
    return (s - tl.load(sums + t - 1, mask=known & (t % Q != 0), other=0.0)) * 0.6931471805599453


@triton.jit
def reach_kernel(
    sums, documents, keeps, reaches, T, window, blocks, H,
    Q: tl.constexpr, BLOCK_T: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """One block of one head. sums, keeps, reaches (B, H, T) fp32; documents (B, T) int32, their numbers."""
    line = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * window
    stop, i = tl.minimum(start + window, T), tl.arange(0, BLOCK_T)
    sums, keeps, reaches, documents = (
        sums + line * T,
        keeps + line * T,
        reaches + line * T,
        documents + line // H * T,
    )
    # sums so far in float64: of thousands of small numbers
    before = tl.zeros([], tl.float64)
    for at in range(start, stop, BLOCK_T):
        t = at + i
        known = t < stop
        a = _log_decays(sums, t, known, Q)
        reach = tl.exp((tl.cumsum(a, 0) + before).to(tl.float32))
        before += tl.sum(a, 0)
        seen = known & (start > 0) & (t < start + window - 1)
        if DOCUMENTS:
            border = tl.load(documents + start - 1, mask=start > 0, other=0)
            seen = seen & (tl.load(documents + t, mask=known, other=0) == border)
        tl.store(reaches + t, tl.where(seen, reach, 0.0), mask=known)
    after = tl.zeros([], tl.float64)
    for back in range(0, tl.cdiv(stop - start, BLOCK_T)):
        t = stop - (back + 1) * BLOCK_T + i
        known = t >= start
        a = _log_decays(sums, t + 1, known & (t + 1 < stop), Q)
        keep = tl.exp((tl.cumsum(a, 0, reverse=True) + after).to(tl.float32))
        after += tl.sum(a, 0)
        seen = known & (t > start) & (stop < T)
        if DOCUMENTS:
            border = tl.load(documents + stop - 1)
            seen = seen & (tl.load(documents + t, mask=known, other=0) == border)
        tl.store(keeps + t, tl.where(seen, keep, 0.0), mask=known)


@triton.jit
def reach_backward_kernel(
    keeps, inserts, dscales, dweights, dinserts, dlog_decays, T, window, blocks, BLOCK_T: tl.constexpr
):  # fmt: skip
    """What comes through keeps and reaches: dlog_decays (B, H, T), and added to dinserts.

    dweights (B, H, T): the gradient of keeps * inserts. dscales (B, H, T): at t - window + 1, so where a
    target's sources begin, the gradient of log reaches_t less dweights times the weight there.
    """
    line = (tl.program_id(0) // blocks).to(tl.int64) * T
    start = tl.program_id(0) % blocks * window
    stop, i = tl.minimum(start + window, T), tl.arange(0, BLOCK_T)
    later = tl.zeros([], tl.float32)
    for back in range(0, tl.cdiv(stop - start, BLOCK_T)):
        t = stop - (back + 1) * BLOCK_T + i
        known = t >= start
        first = line + t - (window - 1)
        reached = known & (start > 0)
        weight = tl.load(keeps + first, mask=reached, other=0.0)
        weight *= tl.load(inserts + first, mask=reached, other=0.0)
        g = weight * tl.load(dweights + first, mask=reached, other=0.0)
        g += tl.load(dscales + first, mask=reached, other=0.0)
        tl.store(dlog_decays + line + t, tl.cumsum(g, 0, reverse=True) + later, mask=known)
        later += tl.sum(g, 0)
        keep = tl.load(keeps + line + t, mask=known, other=0.0)
        dw = tl.load(dweights + line + t, mask=keep != 0.0, other=0.0)
        dinsert = tl.load(dinserts + line + t, mask=known, other=0.0)
        tl.store(dinserts + line + t, dinsert + dw * keep, mask=known)
    tl.debug_barrier()  # the tiles of the second walk lie otherwise: what is stored above is read below
    earlier = tl.zeros([], tl.float32)
    for at in range(start, stop, BLOCK_T):
        t = at + i
        known = t < stop
        before = line + t - 1
        keep = tl.load(keeps + before, mask=known & (t - 1 > start), other=0.0)
        kept = keep != 0.0
        g = keep * tl.load(inserts + before, mask=kept, other=0.0)
        g *= tl.load(dweights + before, mask=kept, other=0.0)
        total = tl.load(dlog_decays + line + t, mask=known, other=0.0)
        tl.store(dlog_decays + line + t, total + tl.cumsum(g, 0) + earlier, mask=known)
        earlier += tl.sum(g, 0)


@triton.jit
def ahead_kernel(
    dy, reaches, out, stride_b, stride_t, stride_h, T, H, P, shift, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """out_t = reaches dy at t + shift, zero behind the row: tiles of BLOCK tokens of one head."""
    h, rest = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    batch, t = rest // tl.cdiv(T, BLOCK), rest % tl.cdiv(T, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    p = tl.arange(0, BLOCK_P)
    known = t + shift < T
    scale = tl.load(reaches + (batch * H + h) * T + t + shift, mask=known, other=0.0)
    place = dy + batch * stride_b + h * stride_h + (t + shift)[:, None] * stride_t + p[None, :]
    value = tl.load(place, mask=known[:, None] & (p < P)[None, :], other=0.0).to(tl.float32)
    to = out + ((batch * T + t)[:, None] * H + h) * P + p[None, :]
    tl.store(to, (value * scale[:, None]).to(out.dtype.element_ty), mask=(t < T)[:, None] & (p < P)[None, :])


def window_decays(sums: Tensor, documents: Tensor | None, window: int, chunk: int) -> tuple[Tensor, Tensor]:
    """keeps and reaches, (B, H, T) fp32. sums: as `Launches.decay_sums` makes them, of chunks of `chunk`."""
    batch, heads, length = sums.shape
    keeps, reaches, blocks = (
        sums.new_empty(sums.shape),
        sums.new_empty(sums.shape),
        triton.cdiv(length, window),
    )
    reach_kernel[(batch * heads * blocks,)](
        sums, sums if documents is None else documents, keeps, reaches, length, window, blocks, heads,
        Q=chunk, BLOCK_T=BLOCK_T, DOCUMENTS=documents is not None, num_warps=4,
    )  # fmt: skip
    return keeps, reaches


def window_decays_backward(
    keeps: Tensor, inserts: Tensor, dscales: Tensor, dweights: Tensor, dinserts: Tensor, window: int
) -> Tensor:
    """`reach_backward_kernel` on all blocks: dlog_decays; dinserts in place."""
    batch, heads, length = keeps.shape
    dlog_decays, blocks = keeps.new_empty(keeps.shape), triton.cdiv(length, window)
    reach_backward_kernel[(batch * heads * blocks,)](
        keeps, inserts, dscales, dweights, dinserts, dlog_decays, length, window, blocks, BLOCK_T=BLOCK_T,
        num_warps=4,
    )  # fmt: skip
    return dlog_decays


def scaled_ahead(dy: Tensor, reaches: Tensor, shift: int) -> Tensor:
    """(B, T, H, P) in dy's dtype: reaches (B, H, T) times dy, each token `shift` earlier; then zero."""
    batch, length, heads, headdim = dy.shape
    block, out = 32, dy.new_empty(dy.shape)
    ahead_kernel[(batch * heads * triton.cdiv(length, block),)](
        dy, reaches, out, *dy.stride()[:3], length, heads, headdim, shift,
        BLOCK=block, BLOCK_P=triton.next_power_of_2(headdim), num_warps=4,
    )  # fmt: skip
    return out

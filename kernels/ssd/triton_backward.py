# mypy: disable-error-code="no-untyped-def"
"""Gradients of the scan inside and around each chunk, all chunks at once, without atomics, in a fixed order.

    chunk_gradient_kernel   a chunk and some heads of a group: dx, gradients of sums and weights, and what the
                            scores C B^T gather from those heads
    group_gradient_kernel   a chunk and a group: dB or dC, a product over the channels of all its heads

States S that enter and gradients R that leave each chunk come from `triton_states`. Matrices in a chunk
are kept transposed, (r, q), so that products take their operands as they are: the result of a product is
never transposed (Triton 3.4 to 3.7.0 miscompiles that on Hopper); README.md has the equations and the
letters.
"""

import triton
import triton.language as tl

from kernels.ssd.triton_forward import load_rows
from kernels.ssd.triton_rows import chunk_of, document_before
from kernels.triton_support import dot


@triton.jit(do_not_specialize=["T", "first", "chunks", "n_slots"])
def chunk_gradient_kernel(
    x, B, C, dy, sums, inserts, D, documents, slots, states, dstates,
    dx, dsums, dinserts, dD, dscores,
    stride_x_b, stride_x_t, stride_x_h, stride_B_b, stride_B_t, stride_B_g, stride_C_b, stride_C_t,
    stride_C_g, stride_dy_b, stride_dy_t, stride_dy_h, stride_dx_b, stride_dx_t,
    T, first, chunks, n_slots, H, P, N, G, heads_per_group, splits,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, D_KIND: tl.constexpr,
    DOCUMENTS: tl.constexpr, VARLEN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One chunk, 1 / splits of the heads of one group.

    states, dstates (slots, H, N, P). dx (B, T, H, P), heads side by side. dsums, dinserts (B, H, T) fp32. dD
    (slots, H) or (slots, H, P) fp32. dscores (slots, G, splits, Q, Q) fp32, (r, q).
    """
    pid = tl.program_id(0).to(tl.int64)
    split, rest = pid % splits, pid // splits
    g, slot = rest % G, rest // G
    batch, t0, end = chunk_of(slot, slots, T, first, chunks, n_slots, Q, VARLEN)
    q = tl.arange(0, Q)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    count = tl.minimum(end - t0, Q).to(tl.int32)  # not positive in a slot without tokens
    known = q < count
    last = tl.maximum(t0 + count - 1, 0)
    B_tile = load_rows(
        B + batch * stride_B_b + t0 * stride_B_t + g * stride_B_g, q, count, n, N, stride_B_t, EVEN
    )
    C_tile = load_rows(
        C + batch * stride_C_b + t0 * stride_C_t + g * stride_C_g, q, count, n, N, stride_C_t, EVEN
    )
    scores = dot(B_tile, tl.trans(C_tile))  # (r, q)
    visible = q[:, None] <= q[None, :]
    if DOCUMENTS:
        doc = tl.load(documents + batch * T + t0 + q, mask=known, other=0)
        doc_last = tl.load(documents + batch * T + last)
        doc_before = document_before(documents, batch * T, t0)
        visible = visible & (doc[:, None] == doc[None, :])
    scores = tl.where(visible, scores, 0.0)
    gathered = tl.zeros((Q, Q), tl.float32)
    size = P.to(tl.int64) * N
    mask_p = known[:, None] if EVEN else known[:, None] & (p < P)[None, :]
    mask_np = (n < N)[:, None] & (p < P)[None, :]

    heads = heads_per_group // splits
    head = g * heads_per_group + split * heads
    for h in tl.range(head, head + heads):
        s = tl.load(sums + (batch * H + h) * T + t0 + q, mask=known, other=0.0)
        w = tl.load(inserts + (batch * H + h) * T + t0 + q, mask=known, other=0.0)
        s_last = tl.load(sums + (batch * H + h) * T + last)
        x_tile = load_rows(
            x + batch * stride_x_b + t0 * stride_x_t + h * stride_x_h, q, count, p, P, stride_x_t, EVEN
        )
        dy_tile = load_rows(
            dy + batch * stride_dy_b + t0 * stride_dy_t + h * stride_dy_h, q, count, p, P, stride_dy_t, EVEN
        )
        place = (slot * H + h) * size + (n[:, None] * P + p[None, :])
        if EVEN:
            S, R = tl.load(states + place), tl.load(dstates + place)
        else:
            S = tl.load(states + place, mask=mask_np, other=0.0)
            R = tl.load(dstates + place, mask=mask_np, other=0.0)
        kept, to_end, from_start = tl.exp2(s_last), tl.exp2(s_last - s), tl.exp2(s)
        if DOCUMENTS:
            from_start = tl.where(doc == doc_before, from_start, 0.0)
            to_end = tl.where(doc == doc_last, to_end, 0.0)
            kept = tl.where(doc_last == doc_before, kept, 0.0)
        x32, dy32 = x_tile.to(tl.float32), dy_tile.to(tl.float32)

        # inside the chunk, (r, q)
        retention = tl.where(visible, tl.exp2(tl.minimum(s[None, :] - s[:, None], 0.0)), 0.0)
        dmixer = dot(x_tile, tl.trans(dy_tile)) * retention
        gathered += dmixer * w[:, None]
        dmixer = dmixer * scores
        columns = tl.sum(dmixer, 1)  # (r,): gradient of w_r inside the chunk
        rows = tl.sum(dmixer * w[:, None], 0)  # (q,)
        near = dot((scores * retention).to(x.dtype.element_ty), dy_tile)

        # through the states
        far = dot(B_tile, R)  # (r, p)
        leaving = tl.sum(x32 * far, 1) * to_end
        reading = tl.sum(dy32 * dot(C_tile, S), 1) * from_start
        border = kept * tl.sum(S.to(tl.float32) * R.to(tl.float32))

        gradient = near * w[:, None] + far * (to_end * w)[:, None]
        if D_KIND == 1:
            gradient += dy32 * tl.load(D + h)
            tl.store(dD + slot * H + h, tl.sum(x32 * dy32))
        elif D_KIND == 2:
            gradient += dy32 * tl.load(D + h * P + p, mask=p < P, other=0.0)[None, :]
            tl.store(dD + (slot * H + h) * P + p, tl.sum(x32 * dy32, 0), mask=p < P)
        place = (
            dx + (batch * stride_dx_b + t0 * stride_dx_t + h * P) + (q[:, None] * stride_dx_t + p[None, :])
        )
        tl.store(place, gradient.to(dx.dtype.element_ty), mask=mask_p)
        # row and column sums are equal on the diagonal: taken from each other first, no noise stays there
        ds = (rows - columns * w) + (reading - leaving * w)
        ds += tl.where(q == count - 1, tl.sum(leaving * w) + border, 0.0)
        tl.store(dsums + (batch * H + h) * T + t0 + q, ds, mask=known)
        tl.store(dinserts + (batch * H + h) * T + t0 + q, columns + leaving, mask=known)

    tl.store(dscores + pid * Q * Q + (q[:, None] * Q + q[None, :]), tl.where(visible, gathered, 0.0))


@triton.jit(do_not_specialize=["T", "first", "chunks", "n_slots"])
def group_gradient_kernel(
    u, V, sums, inserts, documents, slots, states, dscores, out,
    stride_u_b, stride_u_t, stride_u_h, stride_V_b, stride_V_t, stride_V_g, stride_out_b, stride_out_t,
    T, first, chunks, n_slots, H, P, N, G, heads_per_group, splits,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, OF_C: tl.constexpr, 
    DOCUMENTS: tl.constexpr, VARLEN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dB or, if OF_C, dC (B, T, G, N), groups side by side, of one chunk and group, BLOCK_N of its columns.

    dB_r = sum_q dscores_rq C_q + sum_heads o_r w_r R^T x_r         u, V, states: x, C, gradients R
    dC_q = sum_r dscores_rq B_r + sum_heads f_q S^T dy_q            u, V, states: dy, B, states S
    """
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(N, BLOCK_N)
    block, rest = pid % blocks, pid // blocks
    g, slot = rest % G, rest // G
    batch, t0, end = chunk_of(slot, slots, T, first, chunks, n_slots, Q, VARLEN)
    q = tl.arange(0, Q)
    p, n = tl.arange(0, BLOCK_P), block.to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    count = tl.minimum(end - t0, Q).to(tl.int32)  # not positive in a slot without tokens
    known = q < count
    last = tl.maximum(t0 + count - 1, 0)
    reached = known
    if DOCUMENTS:
        doc = tl.load(documents + batch * T + t0 + q, mask=known, other=0)
        if OF_C:
            reached = doc == document_before(documents, batch * T, t0)
        else:
            reached = doc == tl.load(documents + batch * T + last)
    size = P.to(tl.int64) * N
    mask_np = (n < N)[:, None] & (p < P)[None, :]
    u_base = u + batch * stride_u_b + t0 * stride_u_t
    total = tl.zeros((Q, BLOCK_N), tl.float32)
    for h in tl.range(g * heads_per_group, (g + 1) * heads_per_group):
        s = tl.load(sums + (batch * H + h) * T + t0 + q, mask=known, other=0.0)
        u_tile = load_rows(u_base + h * stride_u_h, q, count, p, P, stride_u_t, EVEN)
        place = states + (slot * H + h) * size + (n[:, None] * P + p[None, :])
        state = tl.load(place) if EVEN else tl.load(place, mask=mask_np, other=0.0)
        if OF_C:
            weight = tl.exp2(s)
        else:
            w = tl.load(inserts + (batch * H + h) * T + t0 + q, mask=known, other=0.0)
            weight = tl.exp2(tl.load(sums + (batch * H + h) * T + last) - s) * w
        weighted = u_tile.to(tl.float32) * tl.where(reached, weight, 0.0)[:, None]
        total = dot(weighted.to(u.dtype.element_ty), tl.trans(state), total)
    square = dscores + (slot * G + g) * splits * Q * Q
    square += (q[None, :] * Q + q[:, None]) if OF_C else (q[:, None] * Q + q[None, :])
    gathered = tl.zeros((Q, Q), tl.float32)
    for split in range(splits):
        gathered += tl.load(square + split * Q * Q)
    V_tile = load_rows(
        V + batch * stride_V_b + t0 * stride_V_t + g * stride_V_g, q, count, n, N, stride_V_t, EVEN
    )
    total = dot(gathered.to(u.dtype.element_ty), V_tile, total)
    place = (
        out + (batch * stride_out_b + t0 * stride_out_t + g * N) + (q[:, None] * stride_out_t + n[None, :])
    )
    mask = known[:, None] if EVEN else known[:, None] & (n < N)[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=mask)

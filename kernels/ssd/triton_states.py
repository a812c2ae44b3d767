# mypy: disable-error-code="no-untyped-def"
"""States at the borders of chunks and segments, forwards in time or, for gradients, backwards.

    forwards    S <- k S + sum_r (o_r w_r x_r) B_r^T      the state that enters each chunk
    backwards   R <- k R + sum_q (f_q dy_q) C_q^T         the gradient of the state that leaves each chunk

Both are one recurrence over chunks: two token-major matrices, one weight a token; letters as in README.md.
"""

import triton
import triton.language as tl

from kernels.ssd.triton_forward import load_rows, load_state, store_state
from kernels.ssd.triton_rows import document_before, token_range
from kernels.triton_support import dot


@triton.jit(do_not_specialize=["T", "first", "chunks", "segments", "segment_chunks", "first_segment"])
def states_kernel(
    u, V, sums, inserts, documents, cu_seqlens, first_slot, borders, states, ends, keeps,
    stride_u_b, stride_u_t, stride_u_h, stride_V_b, stride_V_t, stride_V_g,
    T, first, chunks, segments, first_segment, segment_chunks, total_segments, H, P, N, heads_per_group,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BACKWARDS: tl.constexpr,
    DOCUMENTS: tl.constexpr, BORDERS: tl.constexpr, STORE: tl.constexpr, ENDS: tl.constexpr,
    VARLEN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One head, BLOCK_N of its state, one segment of one row, within the chunks [first, first + chunks).

    u (B, T, H, P) and V (B, T, G, N): x and B forwards, dy and C backwards.
    BORDERS, the state before the first chunk that is walked, fp32: 0 zero,
    1 borders (rows, total_segments, H, P, N), 2 borders (rows, H, P, N).
    STORE: states (slots, H, N, P), before each chunk.
    ENDS, the state after the last chunk that is walked: 1 ends (rows, total_segments, H, P, N) and what the
    segment keeps of a state, keeps (rows, total_segments, H); 2 ends (rows, H, P, N), of the first segment
    in time.
    """
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(N, BLOCK_N)
    h, rest = pid % H, pid // H
    block, rest = rest % blocks, rest // blocks
    row, segment = rest // segments, first_segment + rest % segments
    batch, start, end = token_range(row, cu_seqlens, T, VARLEN)
    stop = tl.minimum(first + chunks, tl.cdiv(end - start, Q))
    begin = tl.minimum(segment * segment_chunks, stop)
    stop = tl.minimum(begin + segment_chunks, stop)
    slot = tl.load(first_slot + row) if VARLEN else row * chunks - first

    q = tl.arange(0, Q)
    p, n = tl.arange(0, BLOCK_P), block * BLOCK_N + tl.arange(0, BLOCK_N)
    u_base = u + batch * stride_u_b + h * stride_u_h
    V_base = V + batch * stride_V_b + (h // heads_per_group) * stride_V_g
    sums_base, inserts_base = sums + (batch * H + h) * T, inserts + (batch * H + h) * T
    size = P.to(tl.int64) * N
    by_segment, by_row = ((row * total_segments + segment) * H + h) * size, (row * H + h) * size
    if BORDERS == 1:
        state = load_state(borders + by_segment, p, n, P, N, EVEN)
    elif BORDERS == 2:
        state = load_state(borders + by_row, p, n, P, N, EVEN)
    else:
        state = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    kept_all = 1.0
    for i in tl.range(0, stop - begin):
        c = (stop - 1 - i) if BACKWARDS else (begin + i)
        t0 = start + c * Q
        count = tl.minimum(end - t0, Q).to(tl.int32)
        s = tl.load(sums_base + t0 + q, mask=q < count, other=0.0)
        s_last = tl.load(sums_base + t0 + count - 1)
        V_tile = load_rows(V_base + t0 * stride_V_t, q, count, n, N, stride_V_t, EVEN)
        u_tile = load_rows(u_base + t0 * stride_u_t, q, count, p, P, stride_u_t, EVEN)
        kept = tl.exp2(s_last)
        if BACKWARDS:
            weight = tl.exp2(s)
        else:
            weight = tl.exp2(s_last - s) * tl.load(inserts_base + t0 + q, mask=q < count, other=0.0)
        if DOCUMENTS:
            doc = tl.load(documents + batch * T + t0 + q, mask=q < count, other=0)
            doc_last = tl.load(documents + batch * T + t0 + count - 1)
            doc_before = document_before(documents, batch * T, t0)
            weight = tl.where(doc == (doc_before if BACKWARDS else doc_last), weight, 0.0)
            kept = tl.where(doc_last == doc_before, kept, 0.0)
        if STORE:
            place = states + ((slot + c) * H + h) * size + (n[:, None] * P + p[None, :])
            if EVEN:
                tl.store(place, state.to(states.dtype.element_ty))
            else:
                tl.store(place, state.to(states.dtype.element_ty), mask=(n < N)[:, None] & (p < P)[None, :])
        weighted = (u_tile.to(tl.float32) * weight[:, None]).to(u.dtype.element_ty)
        state = dot(tl.trans(V_tile), weighted, state * kept)
        kept_all *= kept
    if ENDS == 1:
        store_state(ends + by_segment, state, p, n, P, N, stop, EVEN)
        tl.store(keeps + (row * total_segments + segment) * H + h, kept_all)
    elif ENDS == 2:  # noqa: SIM102
        if segment == first_segment:
            store_state(ends + by_row, state, p, n, P, N, stop, EVEN)


@triton.jit(do_not_specialize=["segments"])
def merge_kernel(
    borders, keeps, initial, total, segments, H, size,
    BLOCK: tl.constexpr, BACKWARDS: tl.constexpr, INITIAL: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    """Turn what each segment adds, borders (rows, segments, H, P * N) fp32, into what enters it, in place.

    TOTAL: leave borders, and write what leaves the last segment to total (rows, H, P * N). Otherwise what
    that segment adds and keeps is not read.
    """
    blocks = tl.cdiv(size, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    block, rest = pid % blocks, pid // blocks
    h, row = rest % H, rest // H
    i = block * BLOCK + tl.arange(0, BLOCK)
    state = tl.zeros((BLOCK,), tl.float32)
    if INITIAL:
        state = tl.load(initial + (row * H + h) * size + i, mask=i < size, other=0.0)
    read = segments if TOTAL else segments - 1
    # loads run ahead of the sum: each segment is another address
    for j in tl.range(0, segments, num_stages=6):
        segment = (segments - 1 - j) if BACKWARDS else j
        place = (row * segments + segment) * H + h
        added = tl.load(borders + place * size + i, mask=(i < size) & (j < read), other=0.0)
        kept = tl.load(keeps + place, mask=j < read, other=0.0)
        if not TOTAL:
            tl.store(borders + place * size + i, state, mask=i < size)
        state = state * kept + added
    if TOTAL:
        tl.store(total + (row * H + h) * size + i, state, mask=i < size)

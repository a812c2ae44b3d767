# mypy: disable-error-code="no-untyped-def"
"""The scan's forward pass on Hopper: as `triton_forward`, with TMA and asynchronous products.

A program walks the chunks of 64 channels of one head. Its state stays in registers, (P, N); a copy in x's
dtype goes to shared memory once a chunk, for C S. While a chunk is computed the next are on their way.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.ssd.hopper_tiles import (
    barriers,
    chunk_decays,
    chunk_documents,
    clear_tail,
    clip_factor,
    cta_barrier,
    next_stage,
    rows_of,
    state_places,
    vector,
)


@gluon.jit
def _request(x, B, C, bar, xs, Bs, Cs, token, column, column_g, wanted):
    mbarrier.expect(bar, C.block_type.nbytes + B.block_type.nbytes + x.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(C, [token, column_g], bar, Cs, pred=wanted)
    tma.async_copy_global_to_shared(B, [token, column_g], bar, Bs, pred=wanted)
    tma.async_copy_global_to_shared(x, [token, column], bar, xs, pred=wanted)


@gluon.jit(do_not_specialize=["T", "segments", "segment_chunks", "clip_chunks", "clipped_before"])
def hopper_forward_kernel(
    x, B, C, y, y_rows, sums, inserts, D, documents, initial, borders, cu_seqlens, final, max_norm,
    T, segments, segment_chunks, H, heads_per_group, clip_chunks, clipped_before,
    P: gl.constexpr, STAGES: gl.constexpr, D_KIND: gl.constexpr, DOCUMENTS: gl.constexpr,
    INITIAL: gl.constexpr, BORDERS: gl.constexpr, PARALLEL: gl.constexpr, CLIP: gl.constexpr,
    VARLEN: gl.constexpr,
):  # fmt: skip
    """One head, 64 of its channels, of one row: one segment of it if PARALLEL, else all.

    x, B, C, y are descriptors over (tokens of all rows, heads * P or groups * N), y_rows y's pointer.
    borders (rows, segments, H, P, N) fp32, the states before the segments, are read if PARALLEL, else
    written; without BORDERS these are zero. The state before the row is initial or zero, that after it goes
    to `final`.
    D_KIND: 0 none, 1 (H,), 2 (H, P).
    CLIP: after every clip_chunks chunks, counted from clipped_before chunks before the row, a state's
    Frobenius norm is brought down to max_norm (H,); all of a head in one program.
    """
    dtype: gl.constexpr = x.dtype
    Q: gl.constexpr = x.block_shape[0]
    BLOCK_P: gl.constexpr = x.block_shape[1]
    N: gl.constexpr = B.block_shape[1]
    SPLIT: gl.constexpr = gl.num_warps() // 4
    mma_y: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, SPLIT], [16, BLOCK_P // SPLIT, 16])
    mma_q: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, SPLIT], [16, Q // SPLIT, 16])
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, SPLIT], [16, N // SPLIT, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma_q)
    columns: gl.constexpr = gl.SliceLayout(0, mma_q)
    mixing: gl.constexpr = gl.DotOperandLayout(0, mma_y, 2)
    inserting: gl.constexpr = gl.DotOperandLayout(0, mma_s, 2)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])

    pid = gl.program_id(0)
    BLOCKS: gl.constexpr = P // BLOCK_P
    h, rest = pid % H, pid // H
    block, rest = rest % BLOCKS, rest // BLOCKS
    if PARALLEL:
        row, segment = rest // segments, rest % segments
    else:
        row, segment = rest, rest * 0
    batch, start, end = rows_of(row, cu_seqlens, T, VARLEN)
    n_chunks = gl.cdiv(end - start, Q)
    begin = segment * segment_chunks
    stop = gl.minimum(begin + segment_chunks, n_chunks) if PARALLEL else n_chunks
    row_token = batch * T
    column, column_g = h * P + block * BLOCK_P, (h // heads_per_group) * N

    xs = gl.allocate_shared_memory(dtype, [STAGES, Q, BLOCK_P], x.layout)
    Bs = gl.allocate_shared_memory(dtype, [STAGES, Q, N], B.layout)
    Cs = gl.allocate_shared_memory(dtype, [STAGES, Q, N], C.layout)
    ys = gl.allocate_shared_memory(dtype, [Q, BLOCK_P], y.layout)
    state_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_P, N], dtype)
    Ss = gl.allocate_shared_memory(dtype, [BLOCK_P, N], state_layout)
    s_v, w_v, to_end_v, from_start_v = (
        vector(gl.float32, Q), vector(gl.float32, Q), vector(gl.float32, Q), vector(gl.float32, Q)
    )  # fmt: skip
    if DOCUMENTS:
        doc_v = vector(gl.int32, Q)
    bars = barriers(STAGES)
    for i in gl.static_range(STAGES):
        token = row_token + start + (begin + i) * Q
        wanted = begin + i < stop
        _request(
            x, B, C, bars.index(i), xs.index(i), Bs.index(i), Cs.index(i), token, column, column_g, wanted
        )

    q = gl.arange(0, Q, flat)
    at_row, at_column = gl.arange(0, Q, rows), gl.arange(0, Q, columns)
    place = (batch.to(gl.int64) * H + h) * T
    sums, inserts = sums + place, inserts + place
    t = start + begin * Q
    s_next, w_next, last_next = chunk_decays(sums, inserts, t, end, q, Q)
    if DOCUMENTS:
        documents += batch.to(gl.int64) * T
        doc_next, doc_last_next, doc_before_next = chunk_documents(documents, t, start, end, q, Q)
    if D_KIND == 1:
        skip = gl.load(D + h)
    elif D_KIND == 2:
        skip = gl.load(D + column + gl.arange(0, BLOCK_P, gl.SliceLayout(0, mma_y)))
    if CLIP:
        limit = gl.load(max_norm + h)

    p = block * BLOCK_P + gl.arange(0, BLOCK_P, gl.SliceLayout(1, mma_s))
    n = gl.arange(0, N, gl.SliceLayout(0, mma_s))
    row_place = (row.to(gl.int64) * H + h) * (P * N)
    border = ((row.to(gl.int64) * segments + segment) * H + h) * (P * N)
    if PARALLEL and BORDERS:
        state = gl.load(borders + border + state_places(p, n, N, segment))
    elif INITIAL:
        state = gl.load(initial + row_place + state_places(p, n, N, segment))
    else:
        state = gl.zeros([BLOCK_P, N], gl.float32, mma_s)

    stage, phase = 0, 0
    for c in range(begin, stop):
        t = start + c * Q
        count = gl.minimum(end - t, Q)
        xt, Bt, Ct, bar = xs.index(stage), Bs.index(stage), Cs.index(stage), bars.index(stage)
        if not PARALLEL:  # noqa: SIM102
            if c % segment_chunks == 0:
                to_border = border + (c // segment_chunks).to(gl.int64) * H * (P * N)
                gl.store(borders + to_border + state_places(p, n, N, c), state)
        last = last_next
        kept, to_end, from_start = gl.exp2(last), gl.exp2(last - s_next) * w_next, gl.exp2(s_next)
        if DOCUMENTS:
            to_end = gl.where(doc_next == doc_last_next, to_end, 0.0)
            from_start = gl.where(doc_next == doc_before_next, from_start, 0.0)
            kept = gl.where(doc_last_next == doc_before_next, kept, 0.0)
            doc_v.store(doc_next)
        s_v.store(s_next)
        w_v.store(w_next)
        to_end_v.store(to_end)
        from_start_v.store(from_start)
        Ss.store(state.to(dtype))
        tma.store_wait(0)
        fence_async_shared()
        cta_barrier()
        mbarrier.wait(bar, phase)
        if count < Q:
            clear_tail(xt, count, Q, BLOCK_P)
            clear_tail(Bt, count, Q, N)
            fence_async_shared()
            cta_barrier()

        zero_q, zero_y = gl.zeros([Q, Q], gl.float32, mma_q), gl.zeros([Q, BLOCK_P], gl.float32, mma_y)
        scores = warpgroup_mma(Ct, Bt.permute((1, 0)), zero_q, use_acc=False, is_async=True)
        read = warpgroup_mma(Ct, Ss.permute((1, 0)), zero_y, use_acc=False, is_async=True)
        s_next, w_next, last_next = chunk_decays(sums, inserts, t + Q, end, q, Q)
        visible = at_row[:, None] >= at_column[None, :]
        if DOCUMENTS:
            doc_next, doc_last_next, doc_before_next = chunk_documents(documents, t + Q, start, end, q, Q)
            visible = visible & (doc_v.load(rows)[:, None] == doc_v.load(columns)[None, :])
        retention = gl.exp2(s_v.load(rows)[:, None] - s_v.load(columns)[None, :])
        weighted = retention * w_v.load(columns)[None, :]
        state = state * kept

        scores = warpgroup_mma_wait(1, deps=[scores])
        # selected, not multiplied: above the diagonal the retention may be infinite
        mixer = gl.where(visible, scores * weighted, 0.0)
        if D_KIND == 1:
            mixer = gl.where(at_row[:, None] == at_column[None, :], mixer + skip, mixer)
        mixer = gl.convert_layout(mixer.to(dtype), mixing)
        inserted = xt.permute((1, 0)).load(inserting).to(gl.float32)
        inserted = (inserted * to_end_v.load(gl.SliceLayout(0, inserting))[None, :]).to(dtype)
        read = warpgroup_mma_wait(0, deps=[read])
        out = read * from_start_v.load(gl.SliceLayout(1, mma_y))[:, None]
        if D_KIND == 2:
            out += xt.load(mma_y).to(gl.float32) * skip[None, :]
        out = warpgroup_mma(mixer, xt, out, is_async=True)
        state = warpgroup_mma(inserted, Bt, state, is_async=True)
        out = warpgroup_mma_wait(1, deps=[out])
        if count == Q:
            ys.store(out.to(dtype))
            fence_async_shared()
        else:
            at = gl.arange(0, Q, gl.SliceLayout(1, mma_y))
            to = column + gl.arange(0, BLOCK_P, gl.SliceLayout(0, mma_y))
            lines = y_rows + (row_token + t).to(gl.int64) * (H * P)
            gl.store(lines + at[:, None] * (H * P) + to[None, :], out.to(dtype), mask=(at < count)[:, None])
        state = warpgroup_mma_wait(0, deps=[state])
        if CLIP:  # noqa: SIM102
            if count == Q and (c + 1 + clipped_before) % clip_chunks == 0:
                state = state * clip_factor(state, limit)
        cta_barrier()
        if count == Q:
            tma.async_copy_shared_to_global(y, [row_token + t, column], ys)
        wanted = c + STAGES < stop
        _request(x, B, C, bar, xt, Bt, Ct, row_token + t + STAGES * Q, column, column_g, wanted)
        stage, phase = next_stage(stage, phase, STAGES)
    tma.store_wait(0)
    if not PARALLEL or segment == segments - 1:
        gl.store(final + row_place + state_places(p, n, N, stop), state)

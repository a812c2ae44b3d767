# mypy: disable-error-code="no-untyped-def"
"""All gradients of a chunk in one pass on Hopper: what both kernels of `triton_backward` do.

A program takes a chunk and some heads of a group, one after another, with three kinds of warps:

    fetch     brings x, dy and both states of the next heads
    through   what passes through the states S and R: far = R B; dB and dC
    inside    what tokens of the chunk do to each other: near = mixer^T dy; puts both parts of dx together

dB and dC gather in registers over the heads, so nothing of them is stored twice. Letters as in README.md;
matrices inside a chunk are (r, q).
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
    cta_barrier,
    next_stage,
    vector,
)

WARPS = gl.constexpr(4)  # of `inside` and of `through`
# Barriers beside those of the ring, and what `through` hands over, or `inside` itself, for each token.
FAR_FULL, FAR_EMPTY, SQUARE_FULL, BROUGHT = (gl.constexpr(i) for i in range(4))
DS, DW, LAST, BORDER, X_DY = (gl.constexpr(i) for i in range(5))


@gluon.jit
def _fetch(
    x, dy, S, R, xs, dys, Ss, Rs, ring, token, column, line, steps, STAGES: gl.constexpr
):  # fmt: skip
    """Tiles of all heads into a ring of STAGES, each as soon as its place is free."""
    stage, phase = 0, 1
    bytes: gl.constexpr = 2 * x.block_type.nbytes + 2 * S.block_type.nbytes
    for i in range(0, steps):
        bar = ring.index(stage)
        mbarrier.wait(ring.index(STAGES + stage), phase)
        mbarrier.expect(bar, bytes)
        to, of = column + i * x.block_shape[1], line + i * S.block_shape[0]
        tma.async_copy_global_to_shared(x, [token, to], bar, xs.index(stage))
        tma.async_copy_global_to_shared(dy, [token, to], bar, dys.index(stage))
        tma.async_copy_global_to_shared(R, [of, 0], bar, Rs.index(stage))
        tma.async_copy_global_to_shared(S, [of, 0], bar, Ss.index(stage))
        stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _visible(r, q, documents, DOCUMENTS: gl.constexpr, REVERSED: gl.constexpr):
    """Which targets q see the source r, (r, q)."""
    seen = r[:, None] >= q[None, :] if REVERSED else r[:, None] <= q[None, :]
    if DOCUMENTS:
        seen = seen & (documents.load(r.type.layout)[:, None] == documents.load(q.type.layout)[None, :])
    return seen


@gluon.jit
def _inside(
    xs, dys, Ss, Rs, Bt, Ct, ring, others, fars, vectors, square, doc_v, dxs, dx, dx_rows, sums, inserts,
    documents, D, dsums, dinserts, dD, t, end, T, steps, count, token, column, step_dx,
    BLOCKS: gl.constexpr, STAGES: gl.constexpr, D_KIND: gl.constexpr, DOCUMENTS: gl.constexpr,
    REVERSED: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = xs.dtype
    Q: gl.constexpr = Bt.shape[0]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, Q, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    columns: gl.constexpr = gl.SliceLayout(0, mma)
    mixing: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])

    q = gl.arange(0, Q, flat)
    s_v, w_v = vector(gl.float32, Q), vector(gl.float32, Q)
    if DOCUMENTS:
        _, doc_last, doc_before = chunk_documents(documents, t, 0, end, q, Q)
    at_r, at_q = gl.arange(0, Q, rows), gl.arange(0, Q, columns)
    zero = gl.zeros([Q, Q], gl.float32, mma)
    scores = warpgroup_mma(Bt, Ct.permute((1, 0)), zero, use_acc=False)
    scores = gl.where(_visible(at_r, at_q, doc_v, DOCUMENTS, REVERSED), scores, 0.0)
    gathered, diagonal = zero, at_r[:, None] == at_q[None, :]
    ds_sum, dw_sum = gl.zeros([Q], gl.float32, rows), gl.zeros([Q], gl.float32, rows)
    dD_sum = 0.0
    s_next, w_next, last_next = chunk_decays(sums, inserts, t, end, q, Q)
    stage, phase = 0, 0
    for i in range(0, steps):
        xt, dyt, St, Rt = xs.index(stage), dys.index(stage), Ss.index(stage), Rs.index(stage)
        kept = gl.exp2(last_next)
        if DOCUMENTS:
            kept = gl.where(doc_last == doc_before, kept, 0.0)
        cta_barrier()
        s_v.store(s_next)
        w_v.store(w_next)
        cta_barrier()
        mbarrier.wait(ring.index(stage), phase)
        if count < Q:
            clear_tail(xt, count, Q, Q)
            clear_tail(dyt, count, Q, Q)
            fence_async_shared()
            cta_barrier()
        dmixer = warpgroup_mma(xt, dyt.permute((1, 0)), zero, use_acc=False, is_async=True)
        ahead = (gl.minimum(i + 1, steps - 1) // BLOCKS).to(gl.int64) * T
        s_next, w_next, last_next = chunk_decays(sums + ahead, inserts + ahead, t, end, q, Q)
        w = w_v.load(rows)
        retention = gl.exp2(gl.minimum(s_v.load(columns)[None, :] - s_v.load(rows)[:, None], 0.0))
        dmixer = warpgroup_mma_wait(0, deps=[dmixer])
        if D_KIND == 1:
            xdy = gl.sum(gl.where(diagonal, dmixer, 0.0), 1)
        dmixer = dmixer * retention
        gathered += dmixer * w[:, None]
        dmixer = dmixer * scores
        inside = gl.sum(dmixer, 1)
        inside_q = gl.convert_layout(gl.sum(dmixer * w[:, None], 0), rows)
        mixer = gl.convert_layout((scores * retention).to(dtype), mixing)
        near = warpgroup_mma(mixer, dyt, zero, use_acc=False, is_async=True)
        border = warpgroup_mma(St, Rt.permute((1, 0)), zero, use_acc=False, is_async=True)
        near = warpgroup_mma_wait(1, deps=[near])
        gradient = near * w[:, None]
        if D_KIND == 1:
            vectors.index(X_DY).store(xdy)
            gradient += gl.convert_layout(dyt.load(mixing), mma).to(gl.float32) * gl.load(D + i // BLOCKS)
        elif D_KIND == 2:
            dy32 = gl.convert_layout(dyt.load(mixing), mma).to(gl.float32)
            gradient += dy32 * gl.load(D + i * Q + at_q)[None, :]
            of_D = gl.sum(gl.convert_layout(xt.load(mixing), mma).to(gl.float32) * dy32, 0)
            gl.store(dD + i * Q + at_q, of_D)
        border = warpgroup_mma_wait(0, deps=[border])  # its diagonal: S . R by channels
        vectors.index(BORDER).store(kept * gl.sum(gl.where(diagonal, border, 0.0), 1))
        tma.store_wait(0)
        cta_barrier()
        mbarrier.arrive(ring.index(STAGES + stage), count=1)

        mbarrier.wait(others.index(FAR_FULL), i % 2)
        gradient += fars.load(mma)
        # row and column sums are equal on the diagonal: taken from each other first, no noise stays there
        ds = (inside_q - inside * w) + vectors.index(DS).load(rows)
        if REVERSED:  # no decays: what is asked for is the gradient of dy's scale, ds + w dw
            ds_sum += ds
        else:  # sums over a vector as it lies along the columns need no other warp
            to_last = gl.sum(vectors.index(LAST).load(columns) + vectors.index(BORDER).load(columns), 0)
            ds_sum += ds + gl.where(at_r == count - 1, to_last, 0.0)
        dw_sum += inside + vectors.index(DW).load(rows)
        if D_KIND == 1:
            dD_sum += gl.sum(vectors.index(X_DY).load(columns), 0)
        if count == Q:
            dxs.store(gradient.to(dtype))
            fence_async_shared()
        cta_barrier()
        mbarrier.arrive(others.index(FAR_EMPTY), count=1)
        if count == Q:
            tma.async_copy_shared_to_global(dx, [token, column + i * Q], dxs)
        else:
            lines = dx_rows + token.to(gl.int64) * step_dx + column + i * Q
            line = at_r + (i >> 31)  # see `state_places`
            places = lines + line[:, None] * step_dx + at_q[None, :]
            gl.store(places, gradient.to(dtype), mask=(line < count)[:, None])
        if i % BLOCKS == BLOCKS - 1:
            of_head = (i // BLOCKS).to(gl.int64) * T + t
            gl.store(dsums + of_head + at_r, ds_sum, mask=at_r < count)
            gl.store(dinserts + of_head + at_r, dw_sum, mask=at_r < count)
            ds_sum, dw_sum = gl.zeros_like(ds_sum), gl.zeros_like(dw_sum)
            if D_KIND == 1:
                gl.store(dD + i // BLOCKS, dD_sum)
                dD_sum = 0.0
        stage, phase = next_stage(stage, phase, STAGES)
    tma.store_wait(0)
    square.store(gl.where(_visible(at_r, at_q, doc_v, DOCUMENTS, REVERSED), gathered, 0.0).to(dtype))
    fence_async_shared()
    cta_barrier()
    mbarrier.arrive(others.index(SQUARE_FULL), count=1)


@gluon.jit
def _through(
    xs, dys, Ss, Rs, Bt, Ct, ring, others, fars, vectors, square, sums, inserts, documents, dB, dC,
    t, end, T, steps, stride, count,
    BLOCKS: gl.constexpr, STAGES: gl.constexpr, DOCUMENTS: gl.constexpr, REVERSED: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = xs.dtype
    Q: gl.constexpr = Bt.shape[0]
    N: gl.constexpr = Bt.shape[1]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, Q, 16])
    mma_n: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    operand: gl.constexpr = gl.DotOperandLayout(0, mma_n, 2)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])

    q = gl.arange(0, Q, flat)
    w_v, to_end_v, from_start_v = vector(gl.float32, Q), vector(gl.float32, Q), vector(gl.float32, Q)
    if DOCUMENTS:
        doc, doc_last, doc_before = chunk_documents(documents, t, 0, end, q, Q)
    zero = gl.zeros([Q, Q], gl.float32, mma)
    dB_sum, dC_sum = gl.zeros([Q, N], gl.float32, mma_n), gl.zeros([Q, N], gl.float32, mma_n)
    s_next, w_next, last_next = chunk_decays(sums, inserts, t, end, q, Q)
    stage, phase = 0, 0
    for i in range(0, steps):
        xt, dyt, St, Rt = xs.index(stage), dys.index(stage), Ss.index(stage), Rs.index(stage)
        to_end, from_start = gl.exp2(last_next - s_next), gl.exp2(s_next)
        if DOCUMENTS:
            from_start = gl.where(doc == (doc_last if REVERSED else doc_before), from_start, 0.0)
            to_end = gl.where(doc == (doc_before if REVERSED else doc_last), to_end, 0.0)
        cta_barrier()
        w_v.store(w_next)
        to_end_v.store(to_end)
        from_start_v.store(from_start)
        cta_barrier()
        mbarrier.wait(ring.index(stage), phase)
        if count < Q:
            clear_tail(xt, count, Q, Q)
            clear_tail(dyt, count, Q, Q)
            fence_async_shared()
            cta_barrier()
        far = warpgroup_mma(Bt, Rt.permute((1, 0)), zero, use_acc=False, is_async=True)
        ahead = (gl.minimum(i + 1, steps - 1) // BLOCKS).to(gl.int64) * T
        s_next, w_next, last_next = chunk_decays(sums + ahead, inserts + ahead, t, end, q, Q)
        by_row: gl.constexpr = gl.SliceLayout(1, operand)
        weight = (to_end_v.load(by_row) * w_v.load(by_row))[:, None]
        x32 = xt.load(operand).to(gl.float32)  # in registers this is `mma` too
        leaving = (x32 * weight).to(dtype)
        w, to_end = w_v.load(rows), to_end_v.load(rows)
        far = warpgroup_mma_wait(0, deps=[far])
        read = warpgroup_mma(Ct, St.permute((1, 0)), zero, use_acc=False, is_async=True)
        dB_sum = warpgroup_mma(leaving, Rt, dB_sum, is_async=True)
        left = gl.sum(gl.convert_layout(x32, mma) * far, 1) * to_end
        gradient = far * (to_end * w)[:, None]
        read = warpgroup_mma_wait(1, deps=[read])
        dy32 = dyt.load(operand).to(gl.float32)
        reading = (dy32 * from_start_v.load(by_row)[:, None]).to(dtype)
        dC_sum = warpgroup_mma(reading, St, dC_sum, is_async=True)
        dy32 = gl.convert_layout(dy32, mma)
        ds = gl.sum(dy32 * read, 1) * from_start_v.load(rows) - left * w
        mbarrier.wait(others.index(FAR_EMPTY), (i + 1) % 2)
        fars.store(gradient)
        vectors.index(DS).store(ds)
        vectors.index(DW).store(left)
        vectors.index(LAST).store(left * w)
        dB_sum, dC_sum = warpgroup_mma_wait(0, deps=[dB_sum, dC_sum])
        cta_barrier()
        mbarrier.arrive(others.index(FAR_FULL), count=1)
        mbarrier.arrive(ring.index(STAGES + stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)
    mbarrier.wait(others.index(SQUARE_FULL), 0)
    dB_sum = warpgroup_mma(square, Ct, dB_sum)
    dC_sum = warpgroup_mma(square.permute((1, 0)), Bt, dC_sum)
    at, n = gl.arange(0, Q, gl.SliceLayout(1, mma_n)), gl.arange(0, N, gl.SliceLayout(0, mma_n))
    places, known = at[:, None] * stride + n[None, :], (at < count)[:, None]
    gl.store(dB + places, dB_sum.to(dB.dtype.element_ty), mask=known)
    gl.store(dC + places, dC_sum.to(dC.dtype.element_ty), mask=known)


@gluon.jit(do_not_specialize=["T", "first", "chunks", "n_slots", "part_first", "part_length"])
def hopper_gradient_kernel(
    x, B, C, dy, S, R, dx, dx_rows, sums, inserts, D, documents, slots, dsums, dinserts, dD, dB, dC,
    T, first, chunks, n_slots, part_first, part_length, step_dx, step_dB, H, G, heads_per_group, splits,
    P: gl.constexpr, STAGES: gl.constexpr, D_KIND: gl.constexpr, DOCUMENTS: gl.constexpr,
    VARLEN: gl.constexpr, REVERSED: gl.constexpr,
):  # fmt: skip
    """One chunk, 1 / splits of the heads of one group.

    x, B, C, dy, dx: descriptors over tokens; S, R: over (slots * H * P, N), the states that enter the chunks
    and the gradients of those that leave. dx_rows: dx's pointer. dsums, dinserts (B, H, T) fp32. dD (slots,
    H) or (slots, H, P) fp32. dB, dC (splits, B, part_length, G, N), from token
    part_first of a row on, of this program's heads. step_dx, step_dB: elements from token to token.
    REVERSED: of a scan without decays that runs backwards in time; S then comes from behind, R from before.
    """
    dtype: gl.constexpr = x.dtype
    Q: gl.constexpr = x.block_shape[0]
    BLOCK_P: gl.constexpr = x.block_shape[1]
    N: gl.constexpr = B.block_shape[1]
    BLOCKS: gl.constexpr = P // BLOCK_P

    pid = gl.program_id(0)
    split, rest = pid % splits, pid // splits
    g, slot = rest % G, rest // G
    if VARLEN:
        batch = slot * 0
        t = gl.load(slots + slot).to(gl.int32)
        end = gl.load(slots + n_slots + slot).to(gl.int32)
        rows = slot * 0 + 1
    else:
        batch, t, end = slot // chunks, (first + slot % chunks) * Q, slot * 0 + T
        rows = n_slots // chunks
    count = gl.minimum(end - t, Q)
    if count <= 0:  # a slot of packed sequences that holds no token
        return
    token = batch * T + t
    heads = heads_per_group // splits
    head = g * heads_per_group + split * heads
    steps = heads * BLOCKS

    xs = gl.allocate_shared_memory(dtype, [STAGES, Q, BLOCK_P], x.layout)
    dys = gl.allocate_shared_memory(dtype, [STAGES, Q, BLOCK_P], dy.layout)
    Ss = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_P, N], S.layout)
    Rs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_P, N], R.layout)
    Bt = gl.allocate_shared_memory(dtype, [Q, N], B.layout)
    Ct = gl.allocate_shared_memory(dtype, [Q, N], C.layout)
    square = gl.allocate_shared_memory(dtype, [Q, Q], gl.NVMMASharedLayout.get_default_for([Q, Q], dtype))
    dxs = gl.allocate_shared_memory(dtype, [Q, BLOCK_P], dx.layout)
    fars = gl.allocate_shared_memory(gl.float32, [Q, BLOCK_P], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    vectors = gl.allocate_shared_memory(gl.float32, [5, Q], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    doc_v = vector(gl.int32, Q)
    ring = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ring.index(i), count=1)  # its tiles have come
        mbarrier.init(ring.index(STAGES + i), count=2)  # both kinds of warps have read them
    others = barriers(4)
    brought = others.index(BROUGHT)
    mbarrier.expect(brought, B.block_type.nbytes + C.block_type.nbytes)
    tma.async_copy_global_to_shared(B, [token, g * N], brought, Bt)
    tma.async_copy_global_to_shared(C, [token, g * N], brought, Ct)
    if DOCUMENTS:
        documents += batch.to(gl.int64) * T
        flat: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        doc, _, _ = chunk_documents(documents, t, 0, end, gl.arange(0, Q, flat), Q)
        doc_v.store(doc)
    mbarrier.wait(brought, 0)
    if count < Q:
        clear_tail(Bt, count, Q, N)
        clear_tail(Ct, count, Q, N)
    fence_async_shared()
    cta_barrier()

    by_head = (batch.to(gl.int64) * H + head) * T
    sums, inserts, dsums, dinserts = sums + by_head, inserts + by_head, dsums + by_head, dinserts + by_head
    of_group = (split.to(gl.int64) * rows + batch) * part_length + t - part_first
    of_group = of_group * step_dB + g * N
    dB, dC = dB + of_group, dC + of_group
    if D_KIND == 1:
        D, dD = D + head, dD + slot.to(gl.int64) * H + head
    elif D_KIND == 2:
        D, dD = D + head * P, dD + (slot.to(gl.int64) * H + head) * P
    column, line = head * P, (slot * H + head) * P
    # the registers of a processor, 504 a lane of four warps: 240 for each of the two that compute
    gl.warp_specialize(
        [
            (_inside, (
                xs, dys, Ss, Rs, Bt, Ct, ring, others, fars, vectors, square, doc_v, dxs, dx, dx_rows, sums,
                inserts, documents, D, dsums, dinserts, dD, t, end, T, steps, count, token, column, step_dx,
                BLOCKS, STAGES, D_KIND, DOCUMENTS, REVERSED,
            )),
            (_through, (
                xs, dys, Ss, Rs, Bt, Ct, ring, others, fars, vectors, square, sums, inserts, documents, dB,
                dC, t, end, T, steps, step_dB, count, BLOCKS, STAGES, DOCUMENTS, REVERSED,
            )),
            (_fetch, (x, dy, S, R, xs, dys, Ss, Rs, ring, token, column, line, steps, STAGES)),
        ],
        [WARPS, 1],
        [240, 24],
    )  # fmt: skip

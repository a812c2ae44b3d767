# mypy: disable-error-code="no-untyped-def"
"""States at the borders of chunks and segments on Hopper: `triton_states` with TMA and wgmma."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
)

from kernels.ssd.hopper_tiles import (
    barriers,
    chunk_decays,
    chunk_documents,
    clear_tail,
    cta_barrier,
    next_stage,
    rows_of,
    state_places,
    vector,
)


@gluon.jit
def _request(u, V, bar, us, Vs, token, column, column_g, wanted):
    mbarrier.expect(bar, u.block_type.nbytes + V.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(u, [token, column], bar, us, pred=wanted)
    tma.async_copy_global_to_shared(V, [token, column_g], bar, Vs, pred=wanted)


@gluon.jit
def _in_time(i, begin, stop, BACKWARDS: gl.constexpr):
    """The i-th chunk that is walked."""
    if BACKWARDS:
        return stop - 1 - i
    else:
        return begin + i


@gluon.jit
def _walk(
    pid, u, V, states, sums, inserts, documents, cu_seqlens, first_slot, borders, ends, keeps,
    T, first, chunks, segments, first_segment, segment_chunks, total_segments, H, heads_per_group,
    P: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, BACKWARDS: gl.constexpr,
    DOCUMENTS: gl.constexpr, BORDERS: gl.constexpr, STORE: gl.constexpr, ENDS: gl.constexpr,
    VARLEN: gl.constexpr, REVERSED: gl.constexpr,
):  # fmt: skip
    """64 channels of one head, the columns of its state that V's tiles hold, one segment of one row.

    u and V are descriptors over tokens: x and B forwards, dy and C backwards; if REVERSED, of a scan that
    runs backwards in time, the other way round. x is weighted by `inserts`, dy is not. states, written if
    STORE, is one over (slots * H * P, N). BORDERS and ENDS as in `triton_states.states_kernel`.
    """
    dtype: gl.constexpr = u.dtype
    Q: gl.constexpr = u.block_shape[0]
    BLOCK_P: gl.constexpr = u.block_shape[1]
    BLOCK_N: gl.constexpr = V.block_shape[1]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    inserting: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    P_BLOCKS: gl.constexpr = P // BLOCK_P
    N_BLOCKS: gl.constexpr = N // BLOCK_N

    h, rest = pid % H, pid // H
    block_p, rest = rest % P_BLOCKS, rest // P_BLOCKS
    block_n, rest = rest % N_BLOCKS, rest // N_BLOCKS
    row, segment = rest // segments, first_segment + rest % segments
    batch, start, end = rows_of(row, cu_seqlens, T, VARLEN)
    stop = gl.minimum(first + chunks, gl.cdiv(end - start, Q))
    begin = gl.minimum(segment * segment_chunks, stop)
    stop = gl.minimum(begin + segment_chunks, stop)
    walked = stop - begin
    slot = gl.load(first_slot + row).to(gl.int32) if VARLEN else row * chunks - first
    row_token = batch * T
    column, column_g = h * P + block_p * BLOCK_P, (h // heads_per_group) * N + block_n * BLOCK_N

    us = gl.allocate_shared_memory(dtype, [STAGES, Q, BLOCK_P], u.layout)
    Vs = gl.allocate_shared_memory(dtype, [STAGES, Q, BLOCK_N], V.layout)
    weight_v = vector(gl.float32, Q)
    if STORE:
        held = gl.allocate_shared_memory(dtype, [2, BLOCK_P, BLOCK_N], states.layout)
    bars = barriers(STAGES)
    for i in gl.static_range(STAGES):
        token = row_token + start + _in_time(i, begin, stop, BACKWARDS) * Q
        _request(u, V, bars.index(i), us.index(i), Vs.index(i), token, column, column_g, i < walked)

    q = gl.arange(0, Q, flat)
    place = (batch.to(gl.int64) * H + h) * T
    sums, inserts = sums + place, inserts + place
    if DOCUMENTS:
        documents += batch.to(gl.int64) * T
    p = block_p * BLOCK_P + gl.arange(0, BLOCK_P, gl.SliceLayout(1, mma))
    n = block_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, mma))
    by_row = (row.to(gl.int64) * H + h) * (P * N)
    by_segment = ((row.to(gl.int64) * total_segments + segment) * H + h) * (P * N)
    if BORDERS == 1:
        state = gl.load(borders + by_segment + state_places(p, n, N, segment))
    elif BORDERS == 2:
        state = gl.load(borders + by_row + state_places(p, n, N, segment))
    else:
        state = gl.zeros([BLOCK_P, BLOCK_N], gl.float32, mma)
    t_next = gl.maximum(start + _in_time(0, begin, stop, BACKWARDS) * Q, 0)
    s_next, w_next, last_next = chunk_decays(sums, inserts, t_next, end, q, Q)
    stage, phase, kept_all = 0, 0, 1.0
    for i in range(0, walked):
        c = _in_time(i, begin, stop, BACKWARDS)
        t = start + c * Q
        ut, Vt, bar = us.index(stage), Vs.index(stage), bars.index(stage)
        kept = gl.exp2(last_next)
        weight = gl.exp2(s_next) if BACKWARDS else gl.exp2(last_next - s_next)
        if BACKWARDS == REVERSED:
            weight = weight * w_next
        if DOCUMENTS:
            doc, doc_last, doc_before = chunk_documents(documents, t, start, end, q, Q)
            weight = gl.where(doc == (doc_before if BACKWARDS else doc_last), weight, 0.0)
            kept = gl.where(doc_last == doc_before, kept, 0.0)
        weight_v.store(weight)
        if STORE:
            tma.store_wait(1)
            cta_barrier()
            held.index(i % 2).store(state.to(dtype))
            fence_async_shared()
        cta_barrier()
        if STORE:
            line = ((slot + c) * H + h) * P + block_p * BLOCK_P
            tma.async_copy_shared_to_global(states, [line, block_n * BLOCK_N], held.index(i % 2))
        mbarrier.wait(bar, phase)
        if end - t < Q:
            clear_tail(ut, end - t, Q, BLOCK_P)
            clear_tail(Vt, end - t, Q, BLOCK_N)
            fence_async_shared()
            cta_barrier()
        t_next = start + _in_time(gl.minimum(i + 1, walked - 1), begin, stop, BACKWARDS) * Q
        s_next, w_next, last_next = chunk_decays(sums, inserts, t_next, end, q, Q)
        inserted = ut.permute((1, 0)).load(inserting).to(gl.float32)
        inserted = (inserted * weight_v.load(gl.SliceLayout(0, inserting))[None, :]).to(dtype)
        state = warpgroup_mma(inserted, Vt, state * kept)
        kept_all *= kept
        cta_barrier()
        token = row_token + start + _in_time(i + STAGES, begin, stop, BACKWARDS) * Q
        _request(u, V, bar, ut, Vt, token, column, column_g, i + STAGES < walked)
        stage, phase = next_stage(stage, phase, STAGES)
    if STORE:
        tma.store_wait(0)
    if ENDS == 1:
        gl.store(ends + by_segment + state_places(p, n, N, stop), state)
        gl.store(keeps + (row.to(gl.int64) * total_segments + segment) * H + h, kept_all)
    elif ENDS == 2:  # noqa: SIM102
        if segment == first_segment:
            gl.store(ends + by_row + state_places(p, n, N, stop), state)


@gluon.jit(do_not_specialize=["T", "segments", "segment_chunks"])
def hopper_ends_kernel(
    u, V, sums, inserts, documents, ends, keeps, T, segments, first_segment, segment_chunks, total_segments,
    H, heads_per_group,
    P: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, BACKWARDS: gl.constexpr, DOCUMENTS: gl.constexpr,
    REVERSED: gl.constexpr,
):  # fmt: skip
    """What each of `segments` segments from the first adds to a state, and what it keeps of one."""
    _walk(
        gl.program_id(0), u, V, None, sums, inserts, documents, None, None, None, ends, keeps,
        T, 0, segment_chunks * total_segments, segments, first_segment, segment_chunks, total_segments,
        H, heads_per_group, P, N, STAGES, BACKWARDS, DOCUMENTS, 0, False, 1, False,
        REVERSED,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["T", "first", "chunks", "segments", "first_segment", "segment_chunks",
                              "total_segments"])  # fmt: skip
def hopper_slab_kernel(
    x, B, S, dy, C, R, sums, inserts, documents, cu_seqlens, first_slot, borders, ends, dinitial,
    T, first, chunks, segments, first_segment, segment_chunks, total_segments, H, heads_per_group,
    P: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, DOCUMENTS: gl.constexpr,
    BORDERS: gl.constexpr, ENDS: gl.constexpr, VARLEN: gl.constexpr, REVERSED: gl.constexpr,
):  # fmt: skip
    """States that enter the chunks of a slab, and gradients of those that leave: half of the programs each.

    BORDERS: 1 borders holds S before each segment (rows, total_segments, H, P, N); 0 it is zero. ENDS: 1 ends
    holds R behind each segment; 2 behind the slab (rows, H, P, N); 0 it is zero.
    """
    half = gl.num_programs(0) // 2
    pid = gl.program_id(0)
    if pid < half:
        _walk(
            pid, x, B, S, sums, inserts, documents, cu_seqlens, first_slot, borders, None, None,
            T, first, chunks, segments, first_segment, segment_chunks, total_segments, H, heads_per_group,
            P, N, STAGES, False, DOCUMENTS, BORDERS, True, 0, VARLEN, REVERSED,
        )  # fmt: skip
    else:
        _walk(
            pid - half, dy, C, R, sums, inserts, documents, cu_seqlens, first_slot, ends, dinitial, None,
            T, first, chunks, segments, first_segment, segment_chunks, total_segments, H, heads_per_group,
            P, N, STAGES, True, DOCUMENTS, ENDS, True, 2, VARLEN, REVERSED,
        )  # fmt: skip

# mypy: disable-error-code="no-untyped-def"
"""The states between segments under state_norm, on Hopper: a walk over whole rows, no outputs.

Clipping is not linear in the state, so chunks follow one another. Little else does: what a chunk inserts is
weighted while the one before is added, and outputs are computed afterwards, of all segments side by side.
No branch lies between an asynchronous product and the wait for it: with one, states came out wrong.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.ssd.hopper_tiles import (
    barriers,
    chunk_decays,
    clip_factor,
    cta_barrier,
    next_stage,
    state_places,
    vector,
)


@gluon.jit
def _request(x, B, bar, xs, Bs, token, column, column_g, wanted):
    mbarrier.expect(bar, B.block_type.nbytes + x.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(x, [token, column], bar, xs, pred=wanted)
    tma.async_copy_global_to_shared(B, [token, column_g], bar, Bs, pred=wanted)


@gluon.jit
def _inserted(xt, weight, weight_v, bar, phase, layout: gl.constexpr):
    """A chunk's x, weighted, as the operand (P, Q) of its product with B."""
    weight_v.store(weight)
    cta_barrier()
    mbarrier.wait(bar, phase)
    x = xt.permute((1, 0)).load(layout).to(gl.float32)
    return (x * weight_v.load(gl.SliceLayout(0, layout))[None, :]).to(xt.dtype)


@gluon.jit(do_not_specialize=["T", "segments", "segment_chunks", "clip_chunks", "clipped_before"])
def hopper_clip_kernel(
    x, B, sums, inserts, initial, borders, max_norm,
    T, segments, segment_chunks, H, heads_per_group, clip_chunks, clipped_before,
    STAGES: gl.constexpr, INITIAL: gl.constexpr,
):  # fmt: skip
    """One head of 64 channels of one row: borders (rows, segments, H, P, N) fp32, before each segment.

    Otherwise as `hopper_forward.hopper_forward_kernel`. All chunks that are walked are whole; the one after
    them is brought as well, and what it would insert is not used.
    """
    dtype: gl.constexpr = x.dtype
    Q: gl.constexpr = x.block_shape[0]
    P: gl.constexpr = x.block_shape[1]
    N: gl.constexpr = B.block_shape[1]
    SPLIT: gl.constexpr = gl.num_warps() // 4
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, SPLIT], [16, N // SPLIT, 16])
    inserting: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])

    h, row = gl.program_id(0) % H, gl.program_id(0) // H
    chunks = (segments - 1) * segment_chunks
    row_token, column, column_g = row * T, h * P, (h // heads_per_group) * N
    xs = gl.allocate_shared_memory(dtype, [STAGES, Q, P], x.layout)
    Bs = gl.allocate_shared_memory(dtype, [STAGES, Q, N], B.layout)
    weight_v = vector(gl.float32, Q)
    bars = barriers(STAGES)
    for i in gl.static_range(STAGES):
        _request(
            x, B, bars.index(i), xs.index(i), Bs.index(i), row_token + i * Q, column, column_g, i <= chunks
        )

    q = gl.arange(0, Q, flat)
    place = (row.to(gl.int64) * H + h) * T
    sums, inserts = sums + place, inserts + place
    limit = gl.load(max_norm + h)
    p, n = gl.arange(0, P, gl.SliceLayout(1, mma)), gl.arange(0, N, gl.SliceLayout(0, mma))
    by_row = (row.to(gl.int64) * H + h) * (P * N)
    border = (row.to(gl.int64) * segments * H + h) * (P * N)
    if INITIAL:
        state = gl.load(initial + by_row + state_places(p, n, N, row))
    else:
        state = gl.zeros([P, N], gl.float32, mma)

    s, w, last = chunk_decays(sums, inserts, 0, T, q, Q)
    inserted = _inserted(xs.index(0), gl.exp2(last - s) * w, weight_v, bars.index(0), 0, inserting)
    kept, factor = gl.exp2(last), 1.0  # factor: what the state is still to be clipped by
    # decays are asked for two chunks ahead: a chunk takes no longer than such a load
    s, w, last = chunk_decays(sums, inserts, Q, T, q, Q)
    s_next, w_next, last_next = chunk_decays(sums, inserts, 2 * Q, T, q, Q)
    stage, phase = 0, 0
    for c in range(0, chunks):
        if c % segment_chunks == 0:
            to_border = border + (c // segment_chunks).to(gl.int64) * H * (P * N)
            gl.store(borders + to_border + state_places(p, n, N, c), state * factor)
        state = warpgroup_mma(inserted, Bs.index(stage), state * (factor * kept), is_async=True)
        ahead, ahead_phase = next_stage(stage, phase, STAGES)
        weight = gl.exp2(last - s) * w
        inserted_next = _inserted(
            xs.index(ahead), weight, weight_v, bars.index(ahead), ahead_phase, inserting
        )
        kept = gl.exp2(last)
        s, w, last = s_next, w_next, last_next
        s_next, w_next, last_next = chunk_decays(sums, inserts, (c + 3) * Q, T, q, Q)
        state = warpgroup_mma_wait(0, deps=[state])
        factor = clip_factor(state, limit) if (c + 1 + clipped_before) % clip_chunks == 0 else 1.0
        cta_barrier()
        _request(
            x, B, bars.index(stage), xs.index(stage), Bs.index(stage), row_token + (c + STAGES) * Q, column,
            column_g, c + STAGES <= chunks,
        )  # fmt: skip
        inserted, stage, phase = inserted_next, ahead, ahead_phase
    last_border = border + (segments - 1).to(gl.int64) * H * (P * N)
    gl.store(borders + last_border + state_places(p, n, N, chunks), state * factor)

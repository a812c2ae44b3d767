# mypy: disable-error-code="no-untyped-def"
"""What a window reaches of the block before, on Hopper: the second scan of `window`, added to y in place.

A program takes 64 channels of one head and one block of `window` tokens, whose last `window - 1` are sources,
and walks it backwards in chunks. Token t + window - 1, of the block after, reads what is then gathered: the
sources from t on. Nothing decays on the way; weights and reaches hold all decays.
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

from kernels.ssd.hopper_tiles import barriers, clear_tail, cta_barrier, next_stage, vector


@gluon.jit
def _request(x, B, C, bar, xs, Bs, Cs, source, target, column, column_g, wanted):
    mbarrier.expect(bar, C.block_type.nbytes + B.block_type.nbytes + x.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(C, [target, column_g], bar, Cs, pred=wanted)
    tma.async_copy_global_to_shared(B, [source, column_g], bar, Bs, pred=wanted)
    tma.async_copy_global_to_shared(x, [source, column], bar, xs, pred=wanted)


@gluon.jit
def _scales(keeps, inserts, reaches, source, target, sources, targets, q):
    """Weights of the sources and reaches of the targets of a chunk; zero where there are none."""
    kept = gl.load(keeps + source + q, mask=q < sources, other=0.0)
    weight = kept * gl.load(inserts + source + q, mask=q < sources, other=0.0)
    return weight, gl.load(reaches + target + q, mask=q < targets, other=0.0)


@gluon.jit(do_not_specialize=["T", "window", "blocks"])
def hopper_reach_kernel(
    x, B, C, y, y_rows, keeps, inserts, reaches, T, window, blocks, H, heads_per_group,
    P: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """x, B, C, y: descriptors over (tokens of all rows, heads * P or groups * N); y_rows y's pointer. keeps,
    inserts, reaches (B, H, T) fp32: a source weighs keeps * inserts, a target what it reads times reaches.
    """
    dtype: gl.constexpr = x.dtype
    Q: gl.constexpr = x.block_shape[0]
    BLOCK_P: gl.constexpr = x.block_shape[1]
    N: gl.constexpr = B.block_shape[1]
    SPLIT: gl.constexpr = gl.num_warps() // 4
    mma_y: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, SPLIT], [16, BLOCK_P // SPLIT, 16])
    mma_q: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, SPLIT], [16, Q // SPLIT, 16])
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, SPLIT], [16, N // SPLIT, 16])
    mixing: gl.constexpr = gl.DotOperandLayout(0, mma_y, 2)
    inserting: gl.constexpr = gl.DotOperandLayout(0, mma_s, 2)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])

    pid = gl.program_id(0)
    BLOCKS: gl.constexpr = P // BLOCK_P
    h, rest = pid % H, pid // H
    block_p, rest = rest % BLOCKS, rest // BLOCKS
    block, batch = rest % blocks, rest // blocks
    first = 1 + block * window  # source, of its row
    chunks = gl.cdiv(window - 1, Q)
    from_source, to_target = batch * T + first, batch * T + first + window - 1
    column, column_g = h * P + block_p * BLOCK_P, (h // heads_per_group) * N

    xs = gl.allocate_shared_memory(dtype, [STAGES, Q, BLOCK_P], x.layout)
    Bs = gl.allocate_shared_memory(dtype, [STAGES, Q, N], B.layout)
    Cs = gl.allocate_shared_memory(dtype, [STAGES, Q, N], C.layout)
    ys = gl.allocate_shared_memory(dtype, [Q, BLOCK_P], y.layout)
    state_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_P, N], dtype)
    Ss = gl.allocate_shared_memory(dtype, [BLOCK_P, N], state_layout)
    w_v, reach_v = vector(gl.float32, Q), vector(gl.float32, Q)
    bars, y_bar = barriers(STAGES), barriers(1).index(0)
    for i in gl.static_range(STAGES):
        at = (chunks - 1 - i) * Q
        _request(
            x, B, C, bars.index(i), xs.index(i), Bs.index(i), Cs.index(i), from_source + at, to_target + at,
            column, column_g, i < chunks,
        )  # fmt: skip

    q = gl.arange(0, Q, flat)
    at_row = gl.arange(0, Q, gl.SliceLayout(1, mma_q))
    at_column = gl.arange(0, Q, gl.SliceLayout(0, mma_q))
    visible = at_row[:, None] <= at_column[None, :]
    place = (batch.to(gl.int64) * H + h) * T + first
    keeps, inserts, reaches = keeps + place, inserts + place, reaches + place + window - 1
    all_sources, all_targets = window - 1, gl.minimum(T - first - (window - 1), window - 1)
    at = (chunks - 1) * Q
    w_next, reach_next = _scales(keeps, inserts, reaches, at, at, all_sources - at, all_targets - at, q)
    state = gl.zeros([BLOCK_P, N], gl.float32, mma_s)
    stage, phase = 0, 0
    for i in range(0, chunks):
        at = (chunks - 1 - i) * Q
        sources, targets = gl.minimum(all_sources - at, Q), gl.minimum(all_targets - at, Q)
        xt, Bt, Ct, bar = xs.index(stage), Bs.index(stage), Cs.index(stage), bars.index(stage)
        w_v.store(w_next)
        reach_v.store(reach_next)
        Ss.store(state.to(dtype))
        tma.store_wait(0)
        fence_async_shared()
        cta_barrier()
        mbarrier.expect(y_bar, y.block_type.nbytes)
        tma.async_copy_global_to_shared(y, [to_target + at, column], y_bar, ys)
        mbarrier.wait(bar, phase)
        if sources < Q:
            clear_tail(xt, sources, Q, BLOCK_P)
            clear_tail(Bt, sources, Q, N)
            fence_async_shared()
            cta_barrier()
        zero_q, zero_y = gl.zeros([Q, Q], gl.float32, mma_q), gl.zeros([Q, BLOCK_P], gl.float32, mma_y)
        scores = warpgroup_mma(Ct, Bt.permute((1, 0)), zero_q, use_acc=False, is_async=True)
        read = warpgroup_mma(Ct, Ss.permute((1, 0)), zero_y, use_acc=False, is_async=True)
        before = gl.maximum(at - Q, 0)
        w_next, reach_next = _scales(
            keeps, inserts, reaches, before, before, all_sources - before, all_targets - before, q
        )
        inserted = xt.permute((1, 0)).load(inserting).to(gl.float32)
        inserted = (inserted * w_v.load(gl.SliceLayout(0, inserting))[None, :]).to(dtype)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mixer = gl.where(visible, scores * w_v.load(gl.SliceLayout(0, mma_q))[None, :], 0.0)
        mixer = gl.convert_layout(mixer.to(dtype), mixing)
        read = warpgroup_mma_wait(0, deps=[read])
        out = warpgroup_mma(mixer, xt, read, is_async=True)
        state = warpgroup_mma(inserted, Bt, state, is_async=True)
        out = warpgroup_mma_wait(1, deps=[out])
        mbarrier.wait(y_bar, i % 2)
        out = out * reach_v.load(gl.SliceLayout(1, mma_y))[:, None] + ys.load(mma_y).to(gl.float32)
        if targets == Q:
            ys.store(out.to(dtype))
            fence_async_shared()
        else:
            line = gl.arange(0, Q, gl.SliceLayout(1, mma_y))
            to = column + gl.arange(0, BLOCK_P, gl.SliceLayout(0, mma_y))
            lines = y_rows + (to_target + at).to(gl.int64) * (H * P)
            places = lines + line[:, None] * (H * P) + to[None, :]
            gl.store(places, out.to(dtype), mask=(line < targets)[:, None])
        state = warpgroup_mma_wait(0, deps=[state])
        cta_barrier()
        if targets == Q:
            tma.async_copy_shared_to_global(y, [to_target + at, column], ys)
        later = at - STAGES * Q
        _request(
            x, B, C, bar, xt, Bt, Ct, from_source + later, to_target + later, column, column_g, later >= 0
        )  # fmt: skip
        stage, phase = next_stage(stage, phase, STAGES)
    tma.store_wait(0)

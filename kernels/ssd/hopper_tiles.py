# mypy: disable-error-code="no-untyped-def"
"""What the Hopper kernels of the scan share: tiles that TMA brings, their tails, and one chunk's decays.

Written in Gluon, Triton's lower level: operands stay where the tensor cores read them, copies and products
are asynchronous, and no register goes into addresses. The interpreter cannot run them and only Hopper can.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

# Its name from Triton 3.7 on, and the one before.
cta_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
CHUNK = 64  # tokens a chunk: the rows of one product of four warps
CHANNELS = 64  # of a head in one program; a head of 128 is two


@gluon.jit
def barriers(COUNT: gl.constexpr):
    """COUNT barriers that one arrival each completes."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    return bars


@gluon.jit
def vector(dtype: gl.constexpr, Q: gl.constexpr):
    """Room for one number a token: written in one layout, read in those of the products."""
    return gl.allocate_shared_memory(dtype, [Q], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def clear_tail(tile, count, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Zero the rows of a tile from `count` on: they hold tokens of another row, or nothing."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    known = gl.arange(0, ROWS, gl.SliceLayout(1, layout)) < count
    values = tile.load(layout)
    tile.store(gl.where(known[:, None], values, gl.zeros_like(values)))


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The stage of a ring after this one, and the phase of its barrier."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def chunk_decays(sums, inserts, t, end, q, Q: gl.constexpr):
    """Sums and weights of the tokens [t, t + Q) before `end`, zero behind it, and the last one's sum."""
    known = t + q < end
    s = gl.load(sums + t + q, mask=known, other=0.0)
    w = gl.load(inserts + t + q, mask=known, other=0.0)
    return s, w, gl.load(sums + gl.minimum(t + Q, end) - 1, mask=t < end, other=0.0)


@gluon.jit
def chunk_documents(documents, t, start, end, q, Q: gl.constexpr):
    """Document numbers of the tokens [t, t + Q), of the last one before `end`, and of the one before t."""
    doc = gl.load(documents + t + q, mask=t + q < end, other=0)
    last = gl.load(documents + gl.minimum(t + Q, end) - 1, mask=t < end, other=0)
    return doc, last, gl.load(documents + t - 1, mask=(t > 0) & (t < end), other=0)


@gluon.jit
def clip_factor(state, limit):
    """What brings a state down to a Frobenius norm of `limit`. Sums go over a thread's own numbers first."""
    squares = gl.reshape(state * state, [state.shape[0] * state.shape[1]])
    norm = gl.sqrt(gl.sum(squares, 0))
    return gl.where(norm > limit, limit / norm, 1.0)


@gluon.jit
def rows_of(row, cu_seqlens, T, VARLEN: gl.constexpr):
    """(batch, first token, end) of a row, as `triton_rows.token_range`."""
    if VARLEN:
        return row * 0, gl.load(cu_seqlens + row).to(gl.int32), gl.load(cu_seqlens + row + 1).to(gl.int32)
    else:
        return row, row * 0, row * 0 + T


@gluon.jit
def state_places(p, n, N: gl.constexpr, when):
    """Offsets of a state (P, N).

    when: any count from 0 that is known only now. It keeps the compiler from computing these offsets before a
    loop and holding them, a register each, all through it.
    """
    return p[:, None] * N + (n + (when >> 31))[None, :]

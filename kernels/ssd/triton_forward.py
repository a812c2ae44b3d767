# mypy: disable-error-code="no-untyped-def"
"""The scan's forward pass in one kernel: a program walks the chunks of one head with the state in registers.

Scores, decays and chunk states never leave the chip. Heads are neighbours in the grid, so that those of a
group read B and C from the L2 cache at about the same time. Where rows times heads do not fill the GPU,
time is cut into segments whose entering states come from `triton_states`.
"""

import triton
import triton.language as tl

from kernels.ssd.triton_rows import document_before, token_range
from kernels.triton_support import dot


@triton.jit
def load_rows(base, q, count, column, width, stride_t, EVEN: tl.constexpr):
    """Tile (q, column) of a token-major matrix whose first token is at base; zero from `count` tokens on.

    base is 64-bit; offsets inside a tile fit 32 bits, which halves the registers that addresses take.
    """
    mask = (q < count)[:, None] if EVEN else (q < count)[:, None] & (column < width)[None, :]
    return tl.load(base + q[:, None] * stride_t + column[None, :], mask=mask, other=0.0)


@triton.jit
def load_state(base, p, n, P, N, EVEN: tl.constexpr):
    """A state stored (P, N) as an (N, P) tile, fp32."""
    if EVEN:
        return tl.load(base + p[None, :] * N + n[:, None]).to(tl.float32)
    mask = (p < P)[None, :] & (n < N)[:, None]
    return tl.load(base + p[None, :] * N + n[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_state(base, state, p, n, P, N, when, EVEN: tl.constexpr):
    """Store an (N, P) tile as a state (P, N).

    when: any count below 2^40 that is known only now. It keeps the compiler from computing these addresses
    before the loop over chunks and holding them, a register each, all through it.
    """
    n += (when >> 40).to(tl.int32)
    if EVEN:
        tl.store(base + p[None, :] * N + n[:, None], state)
    else:
        tl.store(base + p[None, :] * N + n[:, None], state, mask=(p < P)[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["T", "segments", "only_segment", "segment_chunks"])
def scan_forward_kernel(
    x, B, C, sums, inserts, D, documents, initial, borders, cu_seqlens, y, final,
    stride_x_b, stride_x_t, stride_x_h, stride_B_b, stride_B_t, stride_B_g, stride_C_b, stride_C_t,
    stride_C_g, T, segments, only_segment, segment_chunks, H, P, N, heads_per_group,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, D_KIND: tl.constexpr, DOCUMENTS:
    tl.constexpr,
    INITIAL: tl.constexpr, BORDERS: tl.constexpr, PARALLEL: tl.constexpr, VARLEN: tl.constexpr, EVEN:
    tl.constexpr,
):  # fmt: skip
    """One head, BLOCK_P of its channels, one segment of one row: all of them if PARALLEL, else
    `only_segment`.

    The state before the segment is borders (rows, segments, H, P, N) fp32 if BORDERS, else initial or
    zero. The state after it goes to `final` from the last segment and, one segment a launch, to the next
    border. D_KIND: 0 none, 1 (H,), 2 (H, P).
    """
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(P, BLOCK_P)
    h, rest = pid % H, pid // H
    block, rest = rest % blocks, rest // blocks
    if PARALLEL:
        row, segment = rest // segments, rest % segments
    else:
        row, segment = rest, rest * 0 + only_segment
    batch, start, end = token_range(row, cu_seqlens, T, VARLEN)
    n_chunks = tl.cdiv(end - start, Q)

    q = tl.arange(0, Q)
    p, n = block * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    g = h // heads_per_group
    x_base = x + batch * stride_x_b + h * stride_x_h
    B_base, C_base = B + batch * stride_B_b + g * stride_B_g, C + batch * stride_C_b + g * stride_C_g
    y_base = y + (batch * T * H + h) * P
    sums_base, inserts_base = sums + (batch * H + h) * T, inserts + (batch * H + h) * T
    if D_KIND == 1:
        skip = tl.load(D + h)
    elif D_KIND == 2:
        skip = tl.load(D + h * P + p, mask=p < P, other=0.0)

    size = P.to(tl.int64) * N
    border = ((row * segments + segment) * H + h) * size
    if BORDERS:
        state = load_state(borders + border, p, n, P, N, EVEN)
    elif INITIAL:
        state = load_state(initial + (row * H + h) * size, p, n, P, N, EVEN)
    else:
        state = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    stop = tl.minimum((segment + 1) * segment_chunks, n_chunks)
    for c in tl.range(segment * segment_chunks, stop):
        first = start + c * Q
        count = tl.minimum(end - first, Q).to(tl.int32)
        s = tl.load(sums_base + first + q, mask=q < count, other=0.0)
        w = tl.load(inserts_base + first + q, mask=q < count, other=0.0)
        s_last = tl.load(sums_base + first + count - 1)
        B_tile = load_rows(B_base + first * stride_B_t, q, count, n, N, stride_B_t, EVEN)
        C_tile = load_rows(C_base + first * stride_C_t, q, count, n, N, stride_C_t, EVEN)
        x_tile = load_rows(x_base + first * stride_x_t, q, count, p, P, stride_x_t, EVEN)

        kept, to_end, from_start = tl.exp2(s_last), tl.exp2(s_last - s) * w, tl.exp2(s)
        at = first.to(tl.int32) + q  # not q: comparisons kept over the loop would take 64 registers
        visible = at[:, None] >= at[None, :]
        if DOCUMENTS:
            doc = tl.load(documents + batch * T + first + q, mask=q < count, other=0)
            doc_last = tl.load(documents + batch * T + first + count - 1)
            doc_before = document_before(documents, batch * T, first)
            visible = visible & (doc[:, None] == doc[None, :])
            from_start = tl.where(doc == doc_before, from_start, 0.0)
            to_end = tl.where(doc == doc_last, to_end, 0.0)
            kept = tl.where(doc_last == doc_before, kept, 0.0)

        out = dot(C_tile, state.to(x.dtype.element_ty)) * from_start[:, None]
        mixer = dot(C_tile, tl.trans(B_tile)) * w[None, :]
        mixer = tl.where(visible, mixer * tl.exp2(tl.minimum(s[:, None] - s[None, :], 0.0)), 0.0)
        if D_KIND == 1:
            mixer = tl.where(at[:, None] == at[None, :], mixer + skip, mixer)
        out = dot(mixer.to(x.dtype.element_ty), x_tile, out)
        inserted = (x_tile.to(tl.float32) * to_end[:, None]).to(x.dtype.element_ty)
        state = dot(tl.trans(B_tile), inserted, state * kept)
        if D_KIND == 2:
            out += x_tile.to(tl.float32) * skip[None, :]
        mask = (q < count)[:, None] if EVEN else (q < count)[:, None] & (p < P)[None, :]
        y_tile = y_base + first * H * P
        tl.store(y_tile + q[:, None] * (H * P) + p[None, :], out.to(y.dtype.element_ty), mask=mask)
    if segment == segments - 1:
        store_state(final + (row * H + h) * size, state, p, n, P, N, stop, EVEN)
    elif not PARALLEL:
        store_state(borders + border + H * size, state, p, n, P, N, stop, EVEN)

"""The SSD scan in chunks of Q tokens: matrix products inside a chunk, a recurrence between chunks.

With its own backward, for the CPU and as the fallback everywhere. What is not a matrix product is in
`passes.py`, and on the CPU compiled, of the same shapes (`kernels.native.scan`). Chunks are processed in
blocks of a bounded number of tokens, so working memory does not grow with the sequence and stays near the
cache. For the backward pass the states that enter each chunk and what the tokens read of them are kept; the
matrices inside the chunks are recomputed. See README.md for the equations; the letters of the shapes are
b batch, c chunks, g groups, k heads in a group, q and r tokens in a chunk, p headdim, n d_state.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.native import scan as native
from kernels.native.build import usable
from kernels.ssd import passes as pytorch

# Elements of the largest temporary, the (b, c, g, k, q, r) matrices: 2 MiB in fp32 stays near the cache.
BLOCK_ELEMENTS = 2**19


def chunked_scan(
    x: Tensor,
    log_decay: Tensor,
    insert: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    document_starts: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Scan discretised inputs.

    Args:
        x: (B, T, H, P). log_decay, insert: (B, T, H) fp32. B, C: (B, T, G, N). D: (H,) or (H, P) or None.
        initial_state: (B, H, P, N) or None. document_starts: (B, T) bool or None. chunk_size: power of two.

    Returns:
        y (B, T, H, P) in x's dtype, final state (B, H, P, N) fp32.
    """
    batch, length, heads, headdim = x.shape
    if initial_state is None:
        initial_state = x.new_zeros(batch, heads, headdim, B.shape[3], dtype=torch.float32)
    if D is None:
        D = x.new_zeros(heads, dtype=torch.float32)
    chunk = min(chunk_size, 1 << (length - 1).bit_length())
    skip = D if D.dim() == 1 else torch.zeros_like(D[:, 0])  # one number a head joins the matrices in a chunk
    arguments = [x, log_decay, insert, B, C]
    if pad := -length % chunk:  # padded tokens neither decay nor insert
        arguments = [F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)) for t in arguments]
        document_starts = None if document_starts is None else F.pad(document_starts, (0, pad))
    keep = torch.is_grad_enabled()
    y, state = _ChunkedScan.apply(*arguments, skip, initial_state.float(), document_starts, chunk, keep)
    y = y[:, :length]
    return (y if D.dim() == 1 else y.addcmul(x, D.to(x.dtype))), state


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log_decay: Tensor,
        insert: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        initial_state: Tensor,
        document_starts: Tensor | None,
        chunk: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        groups = B.shape[2]
        passes = native if usable(x, log_decay, insert, B, C, D, initial_state) else pytorch
        decays = (_chunks(t[..., None], groups, chunk)[..., 0] for t in (log_decay, insert))
        starts = None if document_starts is None else document_starts.unflatten(1, (-1, chunk))
        w = passes.weights(*decays, starts, x.dtype)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        xs, ys = (_chunks(t, groups, chunk) for t in (x, y))
        Bs, Cs = (_chunks(t, groups, chunk).squeeze(4) for t in (B, C))
        running, kept = initial_state.unflatten(1, (groups, -1)), []
        for span in _blocks(xs):
            Bb, Cb = Bs[:, span].contiguous(), Cs[:, span].contiguous()
            scaled, x_heads, _ = passes.split(xs[:, span], w.outward[:, span])
            added = (scaled.transpose(3, 4) @ Bb).unflatten(3, (-1, x.shape[3]))
            entering, running = passes.recur(running, w, span, added)
            far = (Cb @ _states(entering)).view(xs[:, span].shape)
            near = passes.mixer(Cb @ Bb.transpose(3, 4), w, span, D) @ x_heads
            passes.join(near, far, w.inward[:, span], out=ys[:, span])
            if keep:
                kept += [entering, far]
        ctx.save_for_backward(x, B, C, D, *w, *kept)
        ctx.chunk, ctx.passes = chunk, passes
        return y, running.flatten(1, 2).clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        passes, chunk = ctx.passes, ctx.chunk
        x, B, C, D, *saved = ctx.saved_tensors
        fields = len(passes.Weights._fields)
        w, kept = passes.Weights(*saved[:fields]), saved[fields:]
        groups = B.shape[2]
        dx, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, B, C))
        xs, dys, dxs = (_chunks(t, groups, chunk) for t in (x, dy, dx))
        Bs, Cs, dBs, dCs = (_chunks(t, groups, chunk).squeeze(4) for t in (B, C, dB, dC))
        dlog_decay, dinsert = x.new_empty(2, *x.shape[:3], dtype=torch.float32).unbind(0)
        ddecays = [_chunks(t[..., None], groups, chunk)[..., 0] for t in (dlog_decay, dinsert)]
        dD = torch.zeros_like(D)
        drunning = dstate.unflatten(1, (groups, -1))
        for i, span in reversed(list(enumerate(_blocks(xs)))):
            entering, far = kept[2 * i : 2 * i + 2]
            Bb, Cb = Bs[:, span].contiguous(), Cs[:, span].contiguous()

            # Through the states that enter each chunk.
            dfar, dy_heads, reading = passes.split(dys[:, span], w.inward[:, span], far)
            dentering = (dfar.transpose(3, 4) @ Cb).view(entering.shape)
            dadded, drunning, dgain = passes.recur_backward(drunning, w, span, dentering, entering)
            scaled, x_heads, _ = passes.split(xs[:, span], w.outward[:, span])
            dscaled = (Bb @ _states(dadded)).view(far.shape)

            # Inside the chunks.
            dmixer = dy_heads @ x_heads.transpose(4, 5)
            mixer, dscores, excess, columns, dD_block = passes.mixer_backward(
                Cb @ Bb.transpose(3, 4), dmixer, w, span, D
            )
            dD += dD_block
            dnear = mixer.transpose(4, 5) @ dy_heads
            leaving = passes.join_backward(dnear, dscaled, xs[:, span], w, span, out=dxs[:, span])

            # What both give to C, B and the decays.
            torch.add(dfar @ entering.flatten(3, 4), dscores @ Bb, out=dCs[:, span])
            torch.add(scaled @ dadded.flatten(3, 4), dscores.transpose(3, 4) @ Cb, out=dBs[:, span])
            sums = (excess, columns, reading, leaving, dgain)
            passes.decay_backward(w, span, sums, *(t[:, span] for t in ddecays))
        return dx, dlog_decay, dinsert, dB, dC, dD, drunning.flatten(1, 2), None, None, None


def _blocks(xs: Tensor) -> list[slice]:
    """Cut the chunks of b c g q k p into blocks."""
    batch, chunks, groups, chunk, heads, _ = xs.shape
    step = max(1, BLOCK_ELEMENTS // (batch * groups * heads * chunk * chunk))
    return [slice(start, min(start + step, chunks)) for start in range(0, chunks, step)]


def _chunks(t: Tensor, groups: int, chunk: int) -> Tensor:
    """(B, T, G K, d) -> b c g q k d, a view."""
    return t.unflatten(2, (groups, -1)).unflatten(1, (-1, chunk)).transpose(2, 3)


def _states(states: Tensor) -> Tensor:
    """b c g k p n -> b c g n (k p), a view."""
    return states.flatten(3, 4).transpose(3, 4)

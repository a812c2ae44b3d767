"""The SSD scan in chunks of Q tokens: matrix products inside a chunk, a recurrence between chunks.

Plain PyTorch with its own backward, for the CPU and as the fallback everywhere. Chunks are processed in
blocks of a bounded number of tokens, so working memory does not grow with the sequence and stays near the
cache. For the backward pass the states that enter each chunk and what the tokens read of them are kept; the
matrices inside the chunks are recomputed. See README.md for the equations; the letters of the shapes are
b batch, c chunks, g groups, k heads in a group, q and r tokens in a chunk, p headdim, n d_state.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of the largest temporary, the (b, c, g, k, q, r) matrices: 2 MiB in fp32 stays near the cache.
BLOCK_ELEMENTS = 2**19
LOG2_E = 1.4426950408889634
# Inside a chunk retentions below 2^-60 count as 2^-60, weights below 1e-30 as 1e-30: no result can show it,
# their products stay clear of denormal numbers, which are ten times slower, and of division by zero.
SMALLEST_BITS, SMALLEST_INSERT = -60.0, 1e-30


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
        w = _Weights.of(log_decay, insert, document_starts, groups, chunk, x.dtype)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        xs, ys = (_chunks(t, groups, chunk) for t in (x, y))
        Bs, Cs = (_chunks(t, groups, chunk).squeeze(4) for t in (B, C))
        running, kept = initial_state.unflatten(1, (groups, -1)), []
        for span in _blocks(xs):
            xb, Bb, Cb = xs[:, span], Bs[:, span].contiguous(), Cs[:, span].contiguous()
            added = (xb * w.outward[:, span]).flatten(4).transpose(3, 4) @ Bb
            states = _recur(running, w, span, added.unflatten(3, (-1, x.shape[3])))
            entering, running = states[:, :-1].to(x.dtype), states[:, -1]
            far = (Cb @ entering.flatten(3, 4).transpose(3, 4)).view(xb.shape)
            mixer = _retention(w, span).mul_(_scores(Bb, Cb, w, span))
            near = _with_skip(mixer, D, x.dtype) @ _per_head(xb)
            torch.addcmul(near.transpose(3, 4), far, w.inward[:, span], out=ys[:, span])
            if keep:
                kept += [entering, far]
        ctx.save_for_backward(x, B, C, D, *w, *kept)
        ctx.chunk = chunk
        return y, running.flatten(1, 2).clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        x, B, C, D, *saved = ctx.saved_tensors
        w, kept = _Weights(*saved[: len(_Weights._fields)]), saved[len(_Weights._fields) :]
        groups, chunk = B.shape[2], ctx.chunk
        dx, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, B, C))
        xs, dys, dxs = (_chunks(t, groups, chunk) for t in (x, dy, dx))
        Bs, Cs, dBs, dCs = (_chunks(t, groups, chunk).squeeze(4) for t in (B, C, dB, dC))
        dsums, dinsert = torch.empty_like(w.to_end), torch.empty_like(w.to_end)
        dD = torch.zeros_like(D)
        drunning = dstate.unflatten(1, (groups, -1))
        for i, span in reversed(list(enumerate(_blocks(xs)))):
            entering, far = kept[2 * i : 2 * i + 2]
            xb, dyb, Bb, Cb = xs[:, span], dys[:, span], Bs[:, span].contiguous(), Cs[:, span].contiguous()

            # Through the states that enter each chunk.
            dfar = dyb * w.inward[:, span]
            dentering = (dfar.flatten(4).transpose(3, 4) @ Cb).view(entering.shape)
            dstates = _recur(drunning, w, span, dentering, backwards=True)
            drunning, dadded = dstates[:, 0], dstates[:, 1:].to(x.dtype)
            dgain = torch.mul(dadded, entering, out=dentering).sum((4, 5), dtype=torch.float32)
            dxo = (Bb @ dadded.flatten(3, 4).transpose(3, 4)).view(xb.shape)
            dC_far = dfar.flatten(4) @ entering.flatten(3, 4)
            dB_far = (xb * w.outward[:, span]).flatten(4) @ dadded.flatten(3, 4)
            leaving = (xb * dxo).sum(-1, dtype=torch.float32).transpose(3, 4) * w.to_end[:, span]
            reading = dfar.mul_(far).sum(-1, dtype=torch.float32).transpose(3, 4)

            # Inside the chunks.
            retention, scores = _retention(w, span), _scores(Bb, Cb, w, span)
            dy_heads = _per_head(dyb)
            dnear = _with_skip(retention * scores, D, x.dtype).transpose(4, 5) @ dy_heads
            torch.addcmul(dnear.transpose(3, 4), dxo, w.outward[:, span], out=dxs[:, span])
            dmixer = (dy_heads @ _per_head(xb).transpose(4, 5)).float()
            dD += dmixer.diagonal(dim1=4, dim2=5).sum((0, 1, 4)).flatten()
            dmixer.mul_(retention)
            dscores = (dmixer.sum(3) * w.visible_in(span)[:, :, :, 0]).to(x.dtype)
            torch.add(dC_far, dscores @ Bb, out=dCs[:, span])
            torch.add(dB_far, dscores.transpose(3, 4) @ Cb, out=dBs[:, span])
            dmixer.mul_(scores)

            # Row and column sums agree exactly on the diagonal: subtracted from each other before anything
            # else is added, they leave no noise where decays are fast.
            columns, insert = dmixer.sum(4), w.insert[:, span]
            dinsert[:, span] = columns / insert + leaving
            leaving *= insert
            torch.add(dmixer.sum(5) - columns, reading - leaving, out=dsums[:, span])
            dsums[:, span, ..., -1] += leaving.sum(-1) + dgain * (w.kept + w.kept_rest)[:, span, ..., 0, 0]
        dlog_decay = dsums.flip(4).cumsum(4).flip(4)
        dlog_decay, dinsert = (_tokens(t) for t in (dlog_decay, dinsert))
        return dx, dlog_decay, dinsert, dB, dC, dD, drunning.flatten(1, 2), None, None, None


class _Weights(NamedTuple):
    """Everything that depends on the decays and insertion weights alone, for the whole sequence."""

    bits: Tensor  # b c g k q fp32: log2 of the retention since the chunk's first token, cumulative
    bits_rest: Tensor  # b c g k q fp32: what fp32 has rounded off bits
    insert: Tensor  # b c g k q fp32
    to_end: Tensor  # b c g k q fp32: retention from q to the chunk's end
    kept: Tensor  # b c g k 1 1 fp32: the chunk's retention, to 8 bits: products with it hardly round
    kept_rest: Tensor  # b c g k 1 1 fp32: and the rest of it, so that a retention near 1 loses nothing
    inward: Tensor  # b c g q k 1 in x's dtype: retention from the chunk's border to q
    outward: Tensor  # b c g q k 1 in x's dtype: to_end * insert
    visible: Tensor  # (b or 1) (c or 1) 1 1 q r bool: r is not after q and in its document

    @classmethod
    def of(
        cls,
        log_decay: Tensor,
        insert: Tensor,
        starts: Tensor | None,
        groups: int,
        chunk: int,
        dtype: torch.dtype,
    ) -> "_Weights":
        log_decay, insert = (
            _chunks(t[..., None], groups, chunk)[..., 0].transpose(3, 4) for t in (log_decay, insert)
        )
        # float64 here, on one number a token and head: after fast tokens the sums reach thousands, and the
        # differences between slow ones still matter
        sums = log_decay.double().cumsum(4)
        from_start, to_end = sums.exp().float(), (sums[..., -1:] - sums).exp().float()
        retention = sums[..., -1, None, None].exp()
        visible = torch.ones(chunk, chunk, dtype=torch.bool, device=sums.device).tril()[
            None, None, None, None
        ]
        if starts is not None:
            documents = starts.unflatten(1, (-1, chunk))[:, :, None, None].cumsum(4)  # b c 1 1 q
            visible = visible & (documents[..., :, None] == documents[..., None, :])
            from_start = from_start * (documents == 0)
            to_end = to_end * (documents == documents[..., -1:])
            retention = retention * (documents[..., -1:, None] == 0)
        inward, outward = (
            t.transpose(3, 4)[..., None].to(dtype).contiguous() for t in (from_start, to_end * insert)
        )
        insert = insert.clamp(min=SMALLEST_INSERT)
        bits, kept = (sums * LOG2_E).float(), retention.bfloat16().float()
        bits_rest, kept_rest = (sums * LOG2_E - bits).float(), (retention - kept).float()
        return cls(bits, bits_rest, insert, to_end.contiguous(), kept, kept_rest, inward, outward, visible)

    def visible_in(self, span: slice) -> Tensor:
        return self.visible if self.visible.shape[1] == 1 else self.visible[:, span]


def _retention(w: _Weights, span: slice) -> Tensor:
    """What token q keeps of what token r inserts, times its weight: b c g k q r fp32; undefined for r > q."""
    bits, rest = w.bits[:, span], w.bits_rest[:, span]
    kept = bits[..., :, None] - bits[..., None, :]
    kept.add_(rest[..., :, None]).sub_(rest[..., None, :])
    return kept.clamp_(SMALLEST_BITS, 0.0).exp2_().mul_(w.insert[:, span, ..., None, :])


def _scores(B: Tensor, C: Tensor, w: _Weights, span: slice) -> Tensor:
    """C B^T where r is visible from q: b c g 1 q r fp32."""
    return (C @ B.transpose(3, 4)).float()[:, :, :, None] * w.visible_in(span)


def _with_skip(mixer: Tensor, D: Tensor, dtype: torch.dtype) -> Tensor:
    """Put D x_t on the diagonal of what token q takes of x_r, in place; in the dtype of x."""
    mixer.diagonal(dim1=4, dim2=5).add_(D.view(mixer.shape[2], -1, 1))
    return mixer.to(dtype)


def _recur(state: Tensor, w: _Weights, span: slice, added: Tensor, backwards: bool = False) -> Tensor:
    """Run state <- retention state + added over the chunks of `span`, in fp32.

    Args:
        state: b g k p n fp32. added: b c g k p n. backwards: from the last chunk.

    Returns:
        The states between chunks, b c+1 g k p n, in the order of the sequence.
    """
    states = state.new_empty(len(state), added.shape[1] + 1, *state.shape[1:])
    ordered = (states, w.kept[:, span], w.kept_rest[:, span], added.float())
    places, kept, rest, parts = (t.unbind(1)[:: -1 if backwards else 1] for t in ordered)
    places[0].copy_(state)
    for c, part in enumerate(parts):
        torch.addcmul(part, places[c], rest[c], out=places[c + 1]).addcmul_(places[c], kept[c])
    return states


def _blocks(xs: Tensor) -> list[slice]:
    """Cut the chunks of b c g q k p into blocks."""
    batch, chunks, groups, chunk, heads, _ = xs.shape
    step = max(1, BLOCK_ELEMENTS // (batch * groups * heads * chunk * chunk))
    return [slice(start, min(start + step, chunks)) for start in range(0, chunks, step)]


def _chunks(t: Tensor, groups: int, chunk: int) -> Tensor:
    """(B, T, G K, d) -> b c g q k d, a view."""
    return t.unflatten(2, (groups, -1)).unflatten(1, (-1, chunk)).transpose(2, 3)


def _tokens(t: Tensor) -> Tensor:
    """b c g k q -> (B, T, G K)."""
    return t.permute(0, 1, 4, 2, 3).flatten(3, 4).flatten(1, 2)


def _per_head(t: Tensor) -> Tensor:
    """b c g q k p -> b c g k q p, contiguous."""
    return t.transpose(3, 4).contiguous()

"""The SSD scan in chunks of Q tokens: matrix products inside a chunk, a recurrence between chunks.

Plain PyTorch with its own backward, for the CPU and as the fallback everywhere. Chunks are processed in
blocks of a bounded number of tokens; only the state at each block's border is kept for the backward pass,
which recomputes the rest. Working memory therefore does not grow with the sequence. See README.md for the
equations; the letters of the shapes are b batch, c chunks, g groups, k heads in a group, q and r tokens in a
chunk, p headdim, n d_state.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of the largest temporary, the (b, c, g, k, q, r) decay matrices: 8 MiB in fp32 stays near the cache.
BLOCK_ELEMENTS = 2**21


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
    chunk = min(chunk_size, 1 << (length - 1).bit_length())
    arguments = (x, log_decay, insert, B, C, D, initial_state.float(), document_starts, chunk)
    return _ChunkedScan.apply(*arguments)  # type: ignore[no-any-return]


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log_decay: Tensor,
        insert: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        initial_state: Tensor,
        document_starts: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        state = initial_state
        borders = []
        for span in _spans(x, chunk):
            block = _Block(x, log_decay, insert, B, C, D, document_starts, span, chunk)
            borders.append(state)
            y[:, span], state = block.forward(state)
        ctx.save_for_backward(x, log_decay, insert, B, C, D, document_starts, *borders)
        ctx.chunk = chunk
        return y, state.clone() if state is initial_state else state

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        x, log_decay, insert, B, C, D, document_starts, *borders = ctx.saved_tensors
        dx, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, B, C))
        dlog_decay, dinsert = torch.empty_like(log_decay), torch.empty_like(insert)
        dD = None if D is None else torch.zeros_like(D)
        for span, border in zip(reversed(_spans(x, ctx.chunk)), reversed(borders), strict=True):
            block = _Block(x, log_decay, insert, B, C, D, document_starts, span, ctx.chunk)
            grads = block.backward(dy[:, span], dstate, border)
            dx[:, span], dlog_decay[:, span], dinsert[:, span], dB[:, span], dC[:, span], block_dD, dstate = grads
            if dD is not None:
                dD += block_dD
        return dx, dlog_decay, dinsert, dB, dC, dD, dstate, None, None


def _spans(x: Tensor, chunk: int) -> list[slice]:
    """Cut (B, T, H, P) into blocks of whole chunks; the last one may be short."""
    batch, length, heads, _ = x.shape
    step = max(1, BLOCK_ELEMENTS // (batch * heads * chunk * chunk)) * chunk
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


class _Block:
    """Some whole chunks of the sequence, laid out for matrix products, with their decays."""

    def __init__(
        self,
        x: Tensor,
        log_decay: Tensor,
        insert: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        document_starts: Tensor | None,
        span: slice,
        chunk: int,
    ) -> None:
        self.dtype, self.D, self.chunk = x.dtype, D, chunk
        self.length = span.stop - span.start
        self.pad = -self.length % chunk  # padded tokens neither decay nor insert
        batch, _, heads, self.headdim = x.shape
        self.groups = B.shape[2]
        self.heads = heads // self.groups
        self.x = self._chunks(x[:, span])  # b c q (g k p)
        self.insert = self._chunks(insert[:, span])  # b c q (g k)
        self.B = self._by_group(self._chunks(B[:, span]))  # b c g q n
        self.C = self._by_group(self._chunks(C[:, span]))
        starts = None if document_starts is None else self._chunks(document_starts[:, span, None])
        self._decays(self._chunks(log_decay[:, span]), starts)
        xw = self._per_head(self.x) * self.insert[..., None]
        self.xw = self._by_group(xw.flatten(3).to(self.dtype))  # b c g q (k p)
        self.xo = self._scale(self.xw, self.to_end)

    def _chunks(self, t: Tensor) -> Tensor:
        """(B, t, ...) -> (b, c, q, flattened rest)."""
        if self.pad:
            t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, self.pad))
        return t.unflatten(1, (-1, self.chunk)).flatten(3)

    def _tokens(self, t: Tensor, *shape: int) -> Tensor:
        """(b, c, q, flattened rest) -> (B, t, *shape), padding dropped."""
        return t.flatten(1, 2)[:, : self.length].unflatten(2, shape)

    def _by_group(self, t: Tensor) -> Tensor:
        """b c q (g rest) -> b c g q rest."""
        return t.unflatten(3, (self.groups, -1)).transpose(2, 3)

    def _from_group(self, t: Tensor) -> Tensor:
        """b c g q rest -> b c q (g rest)."""
        return t.transpose(2, 3).flatten(3)

    def _per_head(self, t: Tensor) -> Tensor:
        """b c q (g k p) -> b c q (g k) p."""
        return t.unflatten(3, (-1, self.headdim))

    def _head_major(self, t: Tensor) -> Tensor:
        """b c g q (k p) -> b c g k q p, contiguous."""
        return t.unflatten(4, (self.heads, -1)).transpose(3, 4).contiguous()

    def _scale(self, t: Tensor, factor: Tensor) -> Tensor:
        """Scale b c g q (k p) by factors b c g k q, in fp32, rounded once."""
        scaled = t.unflatten(4, (self.heads, -1)) * factor.transpose(3, 4)[..., None]
        return scaled.flatten(4).to(self.dtype)

    def _decays(self, log_decay: Tensor, starts: Tensor | None) -> None:
        """Sums of log decays inside each chunk, and from them (fp32):

        within  b c g k q r  retention from token r to token q, 0 above the diagonal and across documents
        from_start, to_end  b c g k q  from the chunk's border to q, and from q to the chunk's end
        total  b c g k  over the chunk, minus one: exact where it is close to zero decay
        """
        sums = self._by_group(log_decay).transpose(3, 4).contiguous().cumsum(-1)
        steps = torch.arange(self.chunk, device=sums.device)
        visible = steps[:, None] >= steps
        if starts is not None:
            documents = starts[..., 0].cumsum(-1)[:, :, None, None]  # b c 1 1 q
            visible = visible & (documents[..., :, None] == documents[..., None, :])
        difference = sums[..., :, None] - sums[..., None, :]
        self.within = difference.masked_fill_(~visible, -torch.inf).exp_()
        self.from_start = sums.exp()
        self.to_end = (sums[..., -1:] - sums).exp()
        self.total = sums[..., -1].expm1()
        if starts is not None:
            self.from_start = self.from_start * (documents == 0)
            self.to_end = self.to_end * (documents == documents[..., -1:])
            self.total = self.total.masked_fill(documents[..., -1] > 0, -1.0)

    def _entering(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """State (B, H, P, N) -> states that enter each chunk (b c g (k p) n), and the state after the last."""
        added = (self.xo.transpose(3, 4) @ self.B).unflatten(3, (self.heads, -1))
        state = state.unflatten(1, (self.groups, self.heads))
        entering = torch.empty_like(added, dtype=torch.float32)
        for c in range(added.shape[1]):  # over chunks
            entering[:, c] = state
            state = torch.addcmul(state + added[:, c], state, self.total[:, c, :, :, None, None])
        return entering.flatten(3, 4), state.flatten(1, 2)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        entering, state = self._entering(state)
        scores = self.C @ self.B.transpose(3, 4)  # b c g q r
        mixer = (scores[:, :, :, None] * self.within).to(self.dtype)
        near = mixer @ self._head_major(self.xw)  # b c g k q p
        far = (self.C @ entering.to(self.dtype).transpose(3, 4)).unflatten(4, (self.heads, -1))
        y = torch.addcmul(near.transpose(3, 4).float(), far.float(), self.from_start.transpose(3, 4)[..., None])
        y = self._per_head(self._from_group(y.flatten(4)))
        if self.D is not None:
            y = y + self._per_head(self.x) * self._skip()
        return self._tokens(y.flatten(3), -1, self.headdim), state

    def _skip(self) -> Tensor:
        assert self.D is not None
        return self.D if self.D.dim() == 2 else self.D[:, None]

    def backward(self, dy: Tensor, dstate: Tensor, border: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, log_decay, insert, B, C, D and the block's entering state."""
        dy_flat = self._chunks(dy)  # b c q (g k p)
        dy_tokens = self._by_group(dy_flat)  # b c g q (k p)
        dy_heads, xw_heads = self._head_major(dy_tokens), self._head_major(self.xw)
        entering, _ = self._entering(border)

        # Through the states that enter each chunk.
        dfar = self._scale(dy_tokens, self.from_start)
        dentering = (dfar.transpose(3, 4) @ self.C).unflatten(3, (self.heads, -1))
        dadded, dtotal, dstate = self._leaving(dentering, dstate, entering)
        low = entering.to(self.dtype)
        dC = dfar @ low
        far = self.C @ low.transpose(3, 4)
        dsums = self._sum_p(far, dfar)  # b c g k q
        dxo = self._scale(self.B @ dadded.transpose(3, 4), self.to_end)
        dB = self.xo @ dadded
        ending = self._sum_p(dxo, self.xw)
        dsums -= ending
        dsums[..., -1] += ending.sum(-1) + dtotal

        # Inside the chunks.
        scores = self.C @ self.B.transpose(3, 4)
        mixer = (scores[:, :, :, None] * self.within).to(self.dtype)
        dxw = self._head_major_to_tokens(mixer.transpose(4, 5) @ dy_heads) + dxo
        dmixer = (dy_heads @ xw_heads.transpose(4, 5)) * self.within
        dscores = dmixer.sum(3).to(self.dtype)
        dmixer *= scores[:, :, :, None]
        dsums += dmixer.sum(-1) - dmixer.sum(-2)
        dC += dscores @ self.B
        dB += dscores.transpose(3, 4) @ self.C

        dlog_decay = dsums.flip(-1).cumsum(-1).flip(-1).transpose(3, 4)  # b c g q k
        dxw = self._per_head(self._from_group(dxw)).float()
        x_heads, dy_heads = self._per_head(self.x), self._per_head(dy_flat)
        dinsert = (dxw * x_heads).sum(-1)
        dx = dxw * self.insert[..., None]
        dD = None
        if self.D is not None:
            dx = torch.addcmul(dx, dy_heads.float(), self._skip())
            dD = (dy_heads * x_heads).sum((0, 1, 2), dtype=torch.float32)
            dD = dD if self.D.dim() == 2 else dD.sum(-1)
        return (
            self._tokens(dx.flatten(3), -1, self.headdim),
            self._tokens(self._from_group(dlog_decay), -1),
            self._tokens(dinsert, -1),
            self._tokens(self._from_group(dB), self.groups, -1),
            self._tokens(self._from_group(dC), self.groups, -1),
            dD,
            dstate,
        )

    def _leaving(self, dentering: Tensor, dstate: Tensor, entering: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the recurrence between chunks backwards.

        Returns the gradient of what each chunk adds (b c g (k p) n), of the sum of its log decays (b c g k),
        and of the state that enters the block (B, H, P, N).
        """
        dstate = dstate.unflatten(1, (self.groups, self.heads))
        dadded = torch.empty_like(dentering, dtype=torch.float32)
        for c in reversed(range(dentering.shape[1])):  # over chunks
            dadded[:, c] = dstate
            dstate = torch.addcmul(dstate + dentering[:, c], dstate, self.total[:, c, :, :, None, None])
        dtotal = (dadded * entering.unflatten(3, (self.heads, -1))).sum((4, 5)) * (self.total + 1)
        return dadded.flatten(3, 4).to(self.dtype), dtotal, dstate.flatten(1, 2)

    def _sum_p(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum of a * b over headdim: two b c g q (k p) -> b c g k q, fp32."""
        product = a.float() * b.float()
        return product.unflatten(4, (self.heads, -1)).sum(-1).transpose(3, 4)

    def _head_major_to_tokens(self, t: Tensor) -> Tensor:
        """b c g k q p -> b c g q (k p)."""
        return t.transpose(3, 4).flatten(4)

"""The SSD scan in chunks of Q tokens: matrix products inside a chunk, a recurrence between chunks.

Plain PyTorch with its own backward, for the CPU and as the fallback everywhere. Chunks are processed in
blocks of a bounded number of tokens, so working memory does not grow with the sequence. For the backward
pass the states that enter each chunk and what the tokens read of them are kept; the rest is recomputed. See
README.md for the equations; the letters of the shapes are b batch, c chunks, g groups, k heads in a group,
q and r tokens in a chunk, p headdim, n d_state.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of the largest temporary, the (b, c, g, k, q, r) decay matrices: 2 MiB in fp32 stays near the cache.
BLOCK_ELEMENTS = 2**19
LOG2_E = 1.4426950408889634
# Retentions below 2^-100 count as 2^-100: no result can show it, and denormal numbers are ten times slower.
SMALLEST_BITS = -100.0


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
    keep = torch.is_grad_enabled()
    arguments = (x, log_decay, insert, B, C, D, initial_state.float(), document_starts, chunk, keep)
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
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        state = initial_state.clone()
        kept = []
        for span in _spans(x, chunk):
            block = _Block(x, log_decay, insert, B, C, D, document_starts, span, chunk)
            y[:, span], state, entering, far = block.forward(state)
            if keep:
                kept += [entering, far]
        ctx.save_for_backward(x, log_decay, insert, B, C, D, document_starts, *kept)
        ctx.chunk = chunk
        return y, state

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        x, log_decay, insert, B, C, D, document_starts, *kept = ctx.saved_tensors
        dx, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, B, C))
        dlog_decay, dinsert = torch.empty_like(log_decay), torch.empty_like(insert)
        dD = None if D is None else torch.zeros_like(D)
        for i, span in reversed(list(enumerate(_spans(x, ctx.chunk)))):
            block = _Block(x, log_decay, insert, B, C, D, document_starts, span, ctx.chunk)
            grads = block.backward(dy[:, span], dstate, *kept[2 * i : 2 * i + 2])
            dx[:, span], dlog_decay[:, span], dinsert[:, span], dB[:, span], dC[:, span], block_dD, dstate = grads
            if dD is not None:
                dD += block_dD
        return dx, dlog_decay, dinsert, dB, dC, dD, dstate, None, None, None


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
        self.dtype, self.chunk = x.dtype, chunk
        self.length = span.stop - span.start
        self.pad = -self.length % chunk  # padded tokens neither decay nor insert
        self.groups = B.shape[2]
        self.heads = x.shape[2] // self.groups
        self.D = None if D is None else D.to(x.dtype).view(self.groups, self.heads, -1)
        self.x = self._chunks(x[:, span])  # b c g q k p
        self.insert = self._chunks(insert[:, span, :, None])  # b c g q k 1
        self.B = self._chunks(B[:, span]).squeeze(4)  # b c g q n
        self.C = self._chunks(C[:, span]).squeeze(4)
        starts = None if document_starts is None else self._chunks(document_starts[:, span, None, None])
        self._decays(self._chunks(log_decay[:, span, :, None])[..., 0].transpose(3, 4).contiguous(), starts)
        self.xo = self.x * (self.insert * self.to_end).to(x.dtype)  # b c g q k p

    def _chunks(self, t: Tensor) -> Tensor:
        """(B, t, G K, d) -> b c g q k d, with K = 1 for tensors that heads share."""
        if self.pad:
            t = F.pad(t, (0, 0, 0, 0, 0, self.pad))
        groups = min(self.groups, t.shape[2])
        return t.unflatten(1, (-1, self.chunk)).unflatten(3, (groups, -1)).transpose(2, 3)

    def _tokens(self, t: Tensor) -> Tensor:
        """b c g q k d -> (B, t, G K, d), padding dropped."""
        return t.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, : self.length]

    def _decays(self, log_decay: Tensor, starts: Tensor | None) -> None:
        """From log decays b c g k q, everything that decays, in fp32:

        within  b c g k q r  retention from token r to token q; 0 above the diagonal and across documents
        from_start, to_end  b c g q k 1  from the chunk's border to q, and from q to the chunk's end
        gain  b c g k 1 1  retention over the whole chunk minus one: no rounding where it is close to zero
        """
        sums = log_decay.cumsum(-1)
        steps = torch.arange(self.chunk, device=sums.device)
        visible = steps[:, None] >= steps
        if starts is not None:
            documents = starts[..., 0].transpose(3, 4).cumsum(-1)  # b c 1 1 q
            visible = visible & (documents[..., :, None] == documents[..., None, :])
        bits = sums * LOG2_E
        difference = bits[..., :, None] - bits[..., None, :]
        self.within = difference.clamp_(SMALLEST_BITS, 0.0).exp2_().mul_(visible)
        from_start, to_end = sums.exp(), (sums[..., -1:] - sums).exp()
        gain = sums[..., -1].expm1()
        if starts is not None:
            from_start = from_start * (documents == 0)
            to_end = to_end * (documents == documents[..., -1:])
            gain = gain.masked_fill(documents[..., -1] > 0, -1.0)
        self.from_start, self.to_end = (t.transpose(3, 4)[..., None].contiguous() for t in (from_start, to_end))
        self.gain = gain[..., None, None]

    def _mixer(self) -> tuple[Tensor, Tensor]:
        """What token q takes of what token r inserts: b c g k q r; and the scores C B^T, b c g 1 q r."""
        scores = (self.C @ self.B.transpose(3, 4)).float()[:, :, :, None]
        return (scores * self.within).to(self.dtype), scores

    def _inserted_per_head(self) -> Tensor:
        """insert * x, b c g k q p, contiguous."""
        x, insert = self.x.transpose(3, 4), self.insert.to(self.dtype).transpose(3, 4)
        # a plain product of permuted tensors would keep their order in memory
        return torch.mul(x, insert, out=x.new_empty(x.shape))

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return y (B, t, H, P), the state after the block, the states that enter each chunk
        (b c g (k p) n), and what each token reads of them before decay (b c g q k p)."""
        entering, state = self._enter(state, self.xo.flatten(4).transpose(3, 4) @ self.B)
        far = (self.C @ entering.transpose(3, 4)).unflatten(4, (self.heads, -1))
        near = self._mixer()[0] @ self._inserted_per_head()
        y = torch.addcmul(near.transpose(3, 4), far, self.from_start.to(self.dtype))
        if self.D is not None:
            y = y.addcmul_(self.x, self.D[:, None])
        return self._tokens(y), state, entering, far

    def _enter(self, state: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """Run state <- state + gain state + added over the chunks, the running state in fp32.

        Args:
            state: (B, H, P, N) fp32. added: b c g (k p) n.

        Returns:
            The states that enter each chunk, as `added`, and the state after the last (B, H, P, N).
        """
        entering = torch.empty_like(added)
        per_head = [t.unflatten(3, (self.heads, -1)) for t in (added, entering)]
        running = state.unflatten(1, (self.groups, self.heads)).clone()
        for c in range(added.shape[1]):
            per_head[1][:, c] = running
            running.addcmul_(running, self.gain[:, c]).add_(per_head[0][:, c])
        return entering, running.flatten(1, 2)

    def _leave(self, dstate: Tensor, dentering: Tensor, entering: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same recurrence backwards: gradients of `added`, of the chunks' log decays (b c g k), of `state`."""
        dadded = torch.empty_like(dentering)
        per_head = [t.unflatten(3, (self.heads, -1)) for t in (dentering, entering, dadded)]
        running = dstate.unflatten(1, (self.groups, self.heads)).clone()
        dgain = torch.empty_like(self.gain[..., 0, 0])
        for c in reversed(range(dentering.shape[1])):
            per_head[2][:, c] = running
            dgain[:, c] = (running * per_head[1][:, c]).sum((3, 4))
            running.addcmul_(running, self.gain[:, c]).add_(per_head[0][:, c])
        return dadded, dgain * (self.gain[..., 0, 0] + 1), running.flatten(1, 2)

    def backward(self, dy: Tensor, dstate: Tensor, entering: Tensor, far: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, log_decay, insert, B, C, D and the block's entering state."""
        dy = self._chunks(dy)  # b c g q k p

        # Through the states that enter each chunk.
        dfar = dy * self.from_start.to(self.dtype)
        dadded, dgain, dstate = self._leave(dstate, dfar.flatten(4).transpose(3, 4) @ self.C, entering)
        dC = dfar.flatten(4) @ entering
        dxo = (self.B @ dadded.transpose(3, 4)).unflatten(4, (self.heads, -1))
        dB = self.xo.flatten(4) @ dadded
        scratch = torch.empty_like(dy)
        ending = torch.mul(dxo, self.xo, out=scratch).sum(-1, dtype=torch.float32)
        dsums = torch.mul(dfar, far, out=scratch).sum(-1, dtype=torch.float32).sub_(ending)  # b c g q k
        dsums[:, :, :, -1] += ending.sum(3) + dgain

        # Inside the chunks.
        mixer, scores = self._mixer()
        dy_heads = dy.transpose(3, 4).contiguous()
        dxw = (mixer.transpose(4, 5) @ dy_heads).transpose(3, 4)
        dxw = torch.addcmul(dxw, dxo, self.to_end.to(self.dtype))  # b c g q k p
        dmixer = (dy_heads @ self._inserted_per_head().transpose(4, 5)).float().mul_(self.within)
        dscores = dmixer.sum(3).to(self.dtype)
        dmixer = dmixer.mul_(scores)
        # row and column sums agree exactly on the diagonal, so fast decays leave no noise
        dsums += (dmixer.sum(-1) - dmixer.sum(-2)).transpose(3, 4)
        dC += dscores @ self.B
        dB += dscores.transpose(3, 4) @ self.C

        dlog_decay = dsums.flip(3).cumsum(3).flip(3)[..., None]
        dinsert = torch.mul(dxw, self.x, out=scratch).sum(-1, keepdim=True, dtype=torch.float32)
        dx = dxw.mul_(self.insert.to(self.dtype))
        dD = None
        if self.D is not None:
            dx = dx.addcmul_(dy, self.D[:, None])
            dD = torch.mul(dy, self.x, out=scratch).sum((0, 1, 3), dtype=torch.float32).flatten(0, 1)
            dD = dD if self.D.shape[2] > 1 or dD.shape[1] == 1 else dD.sum(-1)
        grads = (dx, dlog_decay, dinsert, dB[:, :, :, :, None], dC[:, :, :, :, None])
        dx, dlog_decay, dinsert, dB, dC = (self._tokens(t) for t in grads)
        return dx, dlog_decay[..., 0], dinsert[..., 0], dB, dC, dD, dstate

"""The chunked scan's passes between its matrix products, in PyTorch; `kernels.native.scan` has them in C.

Shapes are written b c g q k p n: batch, chunk, group, head of the group, token of the chunk, channel, state.
Tensors of one block of chunks; `w` holds the whole sequence, `span` selects the block.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634
# Inside a chunk retentions below 2^-60 count as 2^-60, weights below 1e-30 as 1e-30: no result can show it,
# their products stay clear of denormal numbers, which are ten times slower, and of division by zero.
SMALLEST_BITS, SMALLEST_INSERT = -60.0, 1e-30


class Weights(NamedTuple):
    """Everything that depends on the decays and insertion weights alone, for the whole sequence."""

    bits: Tensor  # b c g k q fp32: log2 of the retention since the chunk's first token, cumulative
    bits_rest: Tensor  # b c g k q fp32: what fp32 has rounded off bits
    insert: Tensor  # b c g k q fp32
    to_end: Tensor  # b c g k q fp32: retention from q to the chunk's end
    kept: Tensor  # b c g k fp32: the chunk's retention, to 8 bits: products with it hardly round
    kept_rest: Tensor  # b c g k fp32: and the rest of it, so that a retention near 1 loses nothing
    inward: Tensor  # b c g q k 1 in x's dtype: retention from the chunk's border to q
    outward: Tensor  # b c g q k 1 in x's dtype: to_end * insert
    visible: Tensor  # (b or 1) (c or 1) 1 1 q r bool: r is not after q and in its document

    def visible_in(self, span: slice) -> Tensor:
        return self.visible if self.visible.shape[1] == 1 else self.visible[:, span]


def weights(log_decay: Tensor, insert: Tensor, starts: Tensor | None, dtype: torch.dtype) -> Weights:
    """log_decay, insert: b c g q k fp32; starts: b c q bool. dtype: of the products."""
    log_decay, insert = log_decay.transpose(3, 4), insert.transpose(3, 4)
    chunk = log_decay.shape[4]
    # float64 here, on one number a token and head: after fast tokens the sums reach thousands, and the
    # differences between slow ones still matter
    sums = log_decay.double().cumsum(4)
    from_start, to_end = sums.exp().float(), (sums[..., -1:] - sums).exp().float()
    retention = sums[..., -1].exp()
    visible = torch.ones(chunk, chunk, dtype=torch.bool, device=sums.device).tril()[None, None, None, None]
    if starts is not None:
        documents = starts[:, :, None, None].cumsum(4)  # b c 1 1 q
        visible = visible & (documents[..., :, None] == documents[..., None, :])
        from_start = from_start * (documents == 0)
        to_end = to_end * (documents == documents[..., -1:])
        retention = retention * (documents[..., -1] == 0)
    inward, outward = (
        t.transpose(3, 4)[..., None].to(dtype).contiguous() for t in (from_start, to_end * insert)
    )
    insert = insert.clamp(min=SMALLEST_INSERT)
    bits, kept = (sums * LOG2_E).float(), retention.bfloat16().float()
    bits_rest, kept_rest = (sums * LOG2_E - bits).float(), (retention - kept).float()
    return Weights(bits, bits_rest, insert, to_end.contiguous(), kept, kept_rest, inward, outward, visible)


def split(x: Tensor, weight: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """x b c g q k p scaled by weight b c g q k 1, flat over (k p); x per head, b c g k q p, contiguous; and
    the sum over p of the scaled x with `other` (as x), b c g k q fp32, if that is given."""
    scaled = x * weight
    dot = None if other is None else _dot(scaled, other)
    return scaled.flatten(4), x.transpose(3, 4).contiguous(), dot


def join(near: Tensor, far: Tensor, weight: Tensor, out: Tensor) -> None:
    """out b c g q k p = near b c g k q p, transposed, + far b c g q k p times weight b c g q k 1."""
    torch.addcmul(near.transpose(3, 4), far, weight, out=out)


def join_backward(near: Tensor, far: Tensor, x: Tensor, w: Weights, span: slice, out: Tensor) -> Tensor:
    """`join` with w.outward; returns the sum over p of x with far, times w.to_end: b c g k q."""
    join(near, far, w.outward[:, span], out)
    return _dot(x, far) * w.to_end[:, span]


def recur(state: Tensor, w: Weights, span: slice, added: Tensor) -> tuple[Tensor, Tensor]:
    """Run state <- retention state + added over the chunks of `span`, in fp32.

    Args:
        state: b g k p n fp32. added: b c g k p n.

    Returns:
        The state before each chunk, b c g k p n in the dtype of `added`, and after the last, fp32.
    """
    states = _recur(state, w, span, added, backwards=False)
    return states[:, :-1].to(added.dtype), states[:, -1]


def recur_backward(
    state: Tensor, w: Weights, span: slice, added: Tensor, entering: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`recur` from the last chunk to the first: the state before each addition, and after all of them; and
    the sum over p and n of the former with `entering` (b c g k p n): b c g k fp32."""
    states = _recur(state, w, span, added, backwards=True)
    before = states[:, 1:].to(added.dtype)
    return before, states[:, 0], (before * entering).sum((4, 5), dtype=torch.float32)


def mixer(scores: Tensor, w: Weights, span: slice, D: Tensor) -> Tensor:
    """What token q takes of x_r, b c g k q r, from scores C B^T b c g q r; D (heads,) on the diagonal."""
    return _with_skip(_retention(w, span).mul_(_visible_scores(scores, w, span)), D, scores.dtype)


def mixer_backward(
    scores: Tensor, dmixer: Tensor, w: Weights, span: slice, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From the gradient of the mixer, which may be overwritten.

    Returns:
        The mixer; the gradient of scores; and of E = dmixer * retention * insert * scores the row sums less
        the column sums, and the column sums (b c g k q fp32); the gradient of D.
    """
    retention, visible_scores = _retention(w, span), _visible_scores(scores, w, span)
    again = _with_skip(retention * visible_scores, D, scores.dtype)
    dmixer = dmixer.float()
    dD = dmixer.diagonal(dim1=4, dim2=5).sum((0, 1, 4)).flatten()
    dmixer.mul_(retention)
    dscores = (dmixer.sum(3) * w.visible_in(span)[:, :, :, 0]).to(scores.dtype)
    dmixer.mul_(visible_scores)
    # Row and column sums agree exactly on the diagonal: subtracted from each other before anything else is
    # added, they leave no noise where decays are fast.
    columns = dmixer.sum(4)
    return again, dscores, dmixer.sum(5) - columns, columns, dD


def decay_backward(
    w: Weights,
    span: slice,
    sums: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    dlog_decay: Tensor,
    dinsert: Tensor,
) -> None:
    """Write the gradients of log_decay and insert, b c g q k fp32.

    sums: row less column sums and column sums of `mixer_backward`, what tokens read of entering states, what
    leaves with the chunk (b c g k q fp32 each), and the gradient of the chunk's retention, b c g k.
    """
    excess, columns, reading, leaving, dgain = sums
    insert = w.insert[:, span]
    dinsert.copy_((columns / insert + leaving).transpose(3, 4))
    leaving = leaving * insert
    dsums = excess + (reading - leaving)
    dsums[..., -1] += leaving.sum(-1) + dgain * (w.kept + w.kept_rest)[:, span]
    dlog_decay.copy_(dsums.flip(4).cumsum(4).flip(4).transpose(3, 4))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over p of b c g q k p: b c g k q fp32."""
    return (a * b).sum(-1, dtype=torch.float32).transpose(3, 4)


def _retention(w: Weights, span: slice) -> Tensor:
    """What token q keeps of what token r inserts, times its weight: b c g k q r fp32; undefined for r > q."""
    bits, rest = w.bits[:, span], w.bits_rest[:, span]
    kept = bits[..., :, None] - bits[..., None, :]
    kept.add_(rest[..., :, None]).sub_(rest[..., None, :])
    return kept.clamp_(SMALLEST_BITS, 0.0).exp2_().mul_(w.insert[:, span, ..., None, :])


def _visible_scores(scores: Tensor, w: Weights, span: slice) -> Tensor:
    """Scores where r is visible from q: b c g 1 q r fp32."""
    return scores.float()[:, :, :, None] * w.visible_in(span)


def _with_skip(mixer: Tensor, D: Tensor, dtype: torch.dtype) -> Tensor:
    """Put D x_t on the diagonal of what token q takes of x_r, in place; in `dtype`."""
    mixer.diagonal(dim1=4, dim2=5).add_(D.view(mixer.shape[2], -1, 1))
    return mixer.to(dtype)


def _recur(state: Tensor, w: Weights, span: slice, added: Tensor, backwards: bool) -> Tensor:
    """The states between chunks, b c+1 g k p n fp32, in the order of the sequence."""
    states = state.new_empty(len(state), added.shape[1] + 1, *state.shape[1:])
    retention = (t[:, span, ..., None, None] for t in (w.kept, w.kept_rest))
    ordered = (states, *retention, added.float())
    places, kept, rest, parts = (t.unbind(1)[:: -1 if backwards else 1] for t in ordered)
    places[0].copy_(state)
    for c, part in enumerate(parts):
        torch.addcmul(part, places[c], rest[c], out=places[c + 1]).addcmul_(places[c], kept[c])
    return states

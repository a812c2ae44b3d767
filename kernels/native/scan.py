"""The passes of the chunked scan in C: functions and shapes of `kernels.ssd.passes`."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.native.build import call, rows


class Weights(NamedTuple):
    """As `kernels.ssd.passes.Weights`; document starts stay as they are."""

    bits: Tensor
    bits_rest: Tensor
    insert: Tensor
    to_end: Tensor
    kept: Tensor
    kept_rest: Tensor
    inward: Tensor
    outward: Tensor
    starts: Tensor | None  # b c q bool


def weights(log_decay: Tensor, insert: Tensor, starts: Tensor | None, dtype: torch.dtype) -> Weights:
    b, c, g, q, k = log_decay.shape
    bits, bits_rest, clamped, to_end = torch.empty(4, b, c, g, k, q, dtype=torch.float32).unbind(0)
    kept, kept_rest = torch.empty(2, b, c, g, k, dtype=torch.float32).unbind(0)
    inward, outward = torch.empty(2, b, c, g, q, k, 1, dtype=dtype).unbind(0)
    starts = None if starts is None else starts.contiguous()
    w = Weights(bits, bits_rest, clamped, to_end, kept, kept_rest, inward, outward, starts)
    call("scan_weights", b, c, g, k, q, rows(log_decay), rows(insert), starts, *w[:-1])
    return w


def split(x: Tensor, weight: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    b, c, g, q, k, p = x.shape
    scaled, per_head = (
        torch.empty(b, c, g, q, k, p, dtype=x.dtype),
        torch.empty(b, c, g, k, q, p, dtype=x.dtype),
    )
    dot = None if other is None else torch.empty(b, c, g, k, q, dtype=torch.float32)
    call("scan_split", b, c, g, k, q, p, rows(x), weight, other, scaled, per_head, dot)
    return scaled.flatten(4), per_head, dot


def join(near: Tensor, far: Tensor, weight: Tensor, out: Tensor) -> None:
    b, c, g, q, k, p = far.shape
    call("scan_join", b, c, g, k, q, p, near, far, weight, out, None, None, None)


def join_backward(near: Tensor, far: Tensor, x: Tensor, w: Weights, span: slice, out: Tensor) -> Tensor:
    b, c, g, q, k, p = far.shape
    leaving = torch.empty(b, c, g, k, q, dtype=torch.float32)
    weight, to_end = w.outward[:, span], w.to_end[:, span]
    call("scan_join", b, c, g, k, q, p, near, far, weight, out, rows(x), to_end, leaving)
    return leaving


def recur(state: Tensor, w: Weights, span: slice, added: Tensor) -> tuple[Tensor, Tensor]:
    before, after, _ = _recur(state, w, span, added, None)
    return before, after


def recur_backward(
    state: Tensor, w: Weights, span: slice, added: Tensor, entering: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    before, after, dot = _recur(state, w, span, added, entering)
    assert dot is not None
    return before, after, dot


def _recur(
    state: Tensor, w: Weights, span: slice, added: Tensor, other: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Backwards where `other` is given."""
    b, c, g, k, p, n = added.shape
    state, before = state.contiguous(), torch.empty_like(added)
    after = torch.empty_like(state)
    dot = None if other is None else torch.empty(b, c, g, k, dtype=torch.float32)
    sizes = (b, c, g, k, 0, p * n, int(other is not None))
    retention = (w.kept[:, span], w.kept_rest[:, span])
    call("scan_recur", *sizes, state, added, *retention, before, after, other, dot)
    return before, after, dot


def mixer(scores: Tensor, w: Weights, span: slice, D: Tensor) -> Tensor:
    b, c, g, q, _ = scores.shape
    result = torch.empty(b, c, g, w.bits.shape[3], q, q, dtype=scores.dtype)
    call("scan_mixer", *_mixer_inputs(scores, w, span, D), result, None, None, None, None)
    return result


def mixer_backward(
    scores: Tensor, dmixer: Tensor, w: Weights, span: slice, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, c, g, k, q, _ = dmixer.shape
    dscores = torch.empty_like(scores)
    excess, columns = torch.empty(2, b, c, g, k, q, dtype=torch.float32).unbind(0)
    dD = torch.empty(b, c, g, k, dtype=torch.float32)
    call("scan_mixer_backward", *_mixer_inputs(scores, w, span, D), dmixer, dscores, excess, columns, dD)
    return dmixer, dscores, excess, columns, dD.sum((0, 1)).flatten()


def _mixer_inputs(scores: Tensor, w: Weights, span: slice, D: Tensor) -> tuple[Tensor | int | None, ...]:
    b, c, g, q, _ = scores.shape
    starts = None if w.starts is None else w.starts[:, span]
    numbers = (w.bits[:, span], w.bits_rest[:, span], w.insert[:, span])
    return (b, c, g, w.bits.shape[3], q, scores, *numbers, starts, D.contiguous())


def decay_backward(
    w: Weights,
    span: slice,
    sums: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    dlog_decay: Tensor,
    dinsert: Tensor,
) -> None:
    b, c, g, q, k = dlog_decay.shape
    retention = (w.insert[:, span], w.kept[:, span], w.kept_rest[:, span])
    call("scan_decay_backward", b, c, g, k, q, *sums, *retention, dlog_decay, dinsert)

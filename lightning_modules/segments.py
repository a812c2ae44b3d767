"""Exact backpropagation through sequences of any length: read in segments, all but the last recomputed.

Forward keeps ids, losses (with their log-sum-exps) and the state at each border, and of the last segment what
its gradients need. Backward begins there: it takes the gradients of the segment's loss and of the state after
it back to the state before it, lets everything go, reads the segment before once more (all but its logits),
and so on. Peak memory is that of one segment; the gradients are those of one long forward pass, since states
carry all that later tokens know of earlier ones.

To autograd this is one graph, walked once: a parameter's gradient is whole when its hooks run, so that DDP
reduces it once a step.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.context import Context
from kernels.cross_entropy import Recall
from lightning_modules.backbone import Mamba2LM
from lightning_modules.mitigations import AnyMitigation
from lightning_modules.state import ModelState


class Segment(NamedTuple):
    """Some tokens of every row."""

    ids: Tensor  # (B, S) int64
    targets: Tensor  # (B, S) int64
    document_starts: Tensor | None  # (B, S) bool


def segmented_losses(
    model: Mamba2LM,
    ids: Tensor,
    targets: Tensor,
    state: ModelState | None = None,
    *,
    document_starts: Tensor | None = None,
    mitigation: AnyMitigation | None = None,
    length: int | None,
    truncate_after: int | None = None,
    context: Context | None = None,
) -> tuple[Tensor, ModelState]:
    """`Mamba2LM.token_losses`, in segments of `length` tokens; None or a longer one: as it is.

    truncate_after: cut gradients of the state at the border of every so many segments, counted from the
    start (truncated backpropagation); None: exact.
    context: every segment is sharded over its ranks; `length` counts this rank's tokens.

    Returns:
        -log p(target) of every token (B, T) fp32, and the state after the last.
    """

    def read(
        segment: Segment, state: ModelState | None, recall: Recall | None = None
    ) -> tuple[Tensor, ModelState]:
        starts = segment.document_starts
        return model.token_losses(
            segment.ids,
            segment.targets,
            state,
            document_starts=starts,
            mitigation=mitigation,
            context=context,
            recall=recall,
        )

    if length is None or length >= ids.shape[1]:
        return read(Segment(ids, targets, document_starts), state)
    losses: list[Tensor] = []
    pieces = spans(ids.shape[1], length)
    for index, span in enumerate(pieces):
        starts = None if document_starts is None else document_starts[:, span]
        segment = Segment(ids[:, span], targets[:, span], starts)
        if state is not None and truncate_after is not None and index > 0 and index % truncate_after == 0:
            state = state.detach()
        if torch.is_grad_enabled() and index + 1 < len(pieces):
            some, state = checkpoint(
                read, segment, state, Recall(), use_reentrant=False, preserve_rng_state=False
            )
        else:
            some, state = read(segment, state)
        losses.append(some)
    assert state is not None
    return torch.cat(losses, 1), state


def hidden_by_segments(
    model: Mamba2LM,
    ids: Tensor,
    *,
    document_starts: Tensor | None = None,
    mitigation: AnyMitigation | None = None,
    length: int | None,
    context: Context | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Final hidden states (B, S, d_model) of rows that begin at zero, piece by piece, and which tokens."""
    state = None
    for span in spans(ids.shape[1], length):
        starts = None if document_starts is None else document_starts[:, span]
        hidden, state = model.hidden(
            ids[:, span], state, document_starts=starts, mitigation=mitigation, context=context
        )
        yield span, hidden


def spans(total: int, length: int | None) -> list[slice]:
    """`total` tokens in pieces of `length`, the last perhaps shorter; in one without a length."""
    length = length or total
    return [slice(start, min(start + length, total)) for start in range(0, total, length)]

"""States after every k tokens, for probes: all spans of k tokens at once, then log2 passes over the spans."""

import torch
from torch import Tensor

from kernels.ssd.core import Tokens


def states_after(
    tokens: Tokens, initial_state: Tensor | None, document_starts: Tensor | None, every: int
) -> Tensor:
    """The recurrence's states after `every`, 2 `every`, ... tokens: (B, T // every, H, P, N) fp32.

    Costs one matrix product a span, 2 H P N FLOPs a token, and log2(T / every) passes over the result; with
    gradients each pass stays in memory. Nothing is divided by a retention, so nothing overflows or cancels.
    """
    batch, _, heads, headdim = tokens.x.shape
    groups, d_state = tokens.B.shape[2:]
    count = tokens.length // every
    if initial_state is None:
        initial_state = tokens.x.new_zeros(batch, heads, headdim, d_state, dtype=torch.float32)
    if count == 0:
        return initial_state[:, None][:, :0].float()
    x, log_decay, insert, B, _ = (t[:, : count * every].unflatten(1, (count, every)) for t in tokens)
    # float64, one number a token and head: differences of long sums must keep a retention near 1
    sums = log_decay.double().flatten(1, 2).cumsum(1).view_as(log_decay)
    weight = (sums[:, :, -1:] - sums).exp() * insert
    documents = None
    if document_starts is not None:
        documents = document_starts[:, : count * every].cumsum(1).view(batch, count, every, 1)
        weight = weight * (documents == documents[:, :, -1:])
    weighted = (x * weight.float()[..., None]).unflatten(3, (groups, -1))  # b n t g k p
    added = weighted.permute(0, 1, 3, 4, 5, 2).flatten(3, 4) @ B.float().transpose(2, 3)
    ends = torch.nn.functional.pad(sums[:, :, -1], (0, 0, 1, 0))  # b n+1 h: up to each span's border
    states = torch.cat([initial_state[:, None].float(), added.view(batch, count, heads, headdim, d_state)], 1)
    if documents is not None:
        documents = torch.nn.functional.pad(documents[:, :, -1], (0, 0, 1, 0))
    reach = 1
    while reach <= count:  # each state holds the last `reach` spans; add what those before them hold
        kept = (ends[:, reach:] - ends[:, :-reach]).exp()
        if documents is not None:
            kept = kept * (documents[:, reach:] == documents[:, :-reach])
        further = states[:, reach:] + kept.float()[..., None, None] * states[:, :-reach]
        states = torch.cat([states[:, :reach], further], 1)
        reach *= 2
    return states[:, 1:]

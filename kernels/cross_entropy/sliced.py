"""Cross-entropy of a linear head, a slice of tokens at a time: the full logits never exist."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits per slice: 64 MiB in fp32.
SLICE_LOGITS = 2**24


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(hidden weight^T)[target] for every token, in fp32.

    Args:
        hidden: (..., d). weight: (V, d). targets: (...,) int64 in [0, V).

    Returns:
        (...,) fp32, in nats. Peak memory beyond the inputs is one slice of logits, forward and backward.
    """
    flat, labels = hidden.flatten(0, -2), targets.flatten()
    step = max(1, SLICE_LOGITS // weight.shape[0])
    if len(labels) <= step:
        return _slice_loss(flat, weight, labels).view(targets.shape)
    losses = [
        checkpoint(_slice_loss, flat[i : i + step], weight, labels[i : i + step], use_reentrant=False)
        for i in range(0, len(labels), step)
    ]
    return torch.cat(losses).view(targets.shape)


def _slice_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")

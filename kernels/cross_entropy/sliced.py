"""Cross-entropy of a linear head, a slice of tokens at a time: the full logits never exist."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.arguments import products_dtype
from kernels.cross_entropy.recall import Recall, Recalled, torch_head

# Logits per slice: 64 MiB in fp32.
SLICE_LOGITS = 2**24


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    backend: Literal["torch", "triton"] | None = None,
    recall: Recall | None = None,
) -> Tensor:
    """-log softmax(hidden weight^T)[target] for every token, in fp32.

    Args:
        hidden: (..., d). weight: (V, d). targets: (...,) int64 in [0, V).
        backend: None for Triton kernels on a GPU, PyTorch elsewhere.
        recall: given again for the same tokens it spares their logits; the backward pass forms them anew.

    Returns:
        (...,) fp32, in nats. Peak memory beyond the inputs is one slice of logits, forward and backward.
    """
    flat, labels = hidden.flatten(0, -2), targets.flatten()
    step = max(1, SLICE_LOGITS // weight.shape[0])
    head, on_triton = torch_head(step), (backend or ("triton" if hidden.is_cuda else "torch")) == "triton"
    if on_triton:
        from kernels.cross_entropy.triton_head import HEAD, triton_linear_cross_entropy  # imports triton

        head = HEAD
    if recall is not None:
        dtype = products_dtype(flat)
        return Recalled.apply(flat.to(dtype), weight.to(dtype), labels, recall, head).view(targets.shape)
    if on_triton:
        return triton_linear_cross_entropy(flat, weight, labels).view(targets.shape)
    if len(labels) <= step:
        return _slice_loss(flat, weight, labels).view(targets.shape)
    losses = [
        checkpoint(_slice_loss, flat[i : i + step], weight, labels[i : i + step], use_reentrant=False)
        for i in range(0, len(labels), step)
    ]
    return torch.cat(losses).view(targets.shape)


def _slice_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")

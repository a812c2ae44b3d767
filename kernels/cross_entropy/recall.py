"""The head of tokens that are read twice, as those of a segment that is recomputed for its gradients.

A gradient needs the token's hidden state, target and log-sum-exp. So the second pass forms no logits: it
takes losses and log-sum-exps from the first, 8 bytes a token. Both passes are one operation that saves the
same tensors, which is what `torch.utils.checkpoint` asks of a function that it calls again.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Recall:
    """Of one input of the head: what its first pass found."""

    found: tuple[Tensor, Tensor] | None = None  # losses and log-sum-exps, (M,) fp32


class Head(NamedTuple):
    """How a backend computes.

    forward: hidden, weight, labels -> losses, log-sum-exps.
    backward: dlosses, hidden, weight, labels, log-sum-exps -> dhidden, dweight.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor]]


class Recalled(torch.autograd.Function):
    """hidden (M, d), weight (V, d), labels (M,) -> losses (M,) fp32; products in the dtype of hidden."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, recall: Recall, head: Head
    ) -> Tensor:
        if recall.found is None:
            recall.found = head.forward(hidden, weight, labels)
        losses, normalisers = recall.found
        ctx.head = head
        ctx.save_for_backward(hidden, weight, labels, normalisers)
        return losses.detach()  # what is recalled takes no part in a graph

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        return *ctx.head.backward(dlosses, *ctx.saved_tensors), None, None, None


def torch_head(step: int) -> Head:
    """In PyTorch, `step` tokens at a time."""
    return Head(partial(_forward, step), partial(_backward, step))


def _forward(step: int, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    losses, normalisers = (hidden.new_empty(len(labels), dtype=torch.float32) for _ in range(2))
    for tokens, logits in _slices(step, hidden, weight):
        normalisers[tokens] = logits.logsumexp(1)
        losses[tokens] = normalisers[tokens] - logits.gather(1, labels[tokens, None])[:, 0]
    return losses, normalisers


def _backward(
    step: int, dlosses: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, normalisers: Tensor
) -> tuple[Tensor, Tensor]:
    dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
    for tokens, logits in _slices(step, hidden, weight):
        p = logits.sub_(normalisers[tokens, None]).exp_()
        p.scatter_add_(1, labels[tokens, None], p.new_full((len(p), 1), -1.0))  # p - onehot
        dlogits = p.mul_(dlosses[tokens, None]).to(hidden.dtype)
        dhidden[tokens] = dlogits @ weight
        dweight += dlogits.t() @ hidden[tokens]
    return dhidden, dweight.to(weight.dtype)


def _slices(step: int, hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Tokens and their logits in fp32."""
    for start in range(0, len(hidden), step):
        tokens = slice(start, start + step)
        yield tokens, F.linear(hidden[tokens], weight).float()

"""Norms of a step's gradients by what they belong to: computed where they lie, told in one transfer."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# The tied head is the embedding: one parameter, one gradient.
GROUPS = ("embedding", "in_proj", "conv1d", "recurrence", "norms", "out_proj", "head")
RECURRENCE = ("A_log", "D", "dt_bias")


def group_of(name: str) -> str:
    """Which of GROUPS the parameter of this name belongs to."""
    parts = name.split(".")
    if parts[-1] in RECURRENCE:
        return "recurrence"
    module = parts[-2]
    if module == "lm_head":
        return "head"
    return module if module in GROUPS else "norms"


def norms_by_group(
    gradients: Iterable[tuple[str, Tensor]], add: Callable[[Tensor], Tensor] = lambda squares: squares
) -> dict[str, float]:
    """Group -> norm, for the groups that the model has.

    Args:
        gradients: a parameter's name and its gradient, or the share of it that this rank holds, if any.
        add: sums a tensor over all ranks, where ranks hold shares. They then all name all parameters.
    """
    groups: dict[str, list[Tensor]] = {}
    for name, gradient in gradients:
        groups.setdefault(group_of(name), []).append(gradient)
    squares = torch.stack([torch.nn.utils.get_total_norm(some).double() ** 2 for some in groups.values()])
    norms = dict(zip(groups, add(squares).sqrt().tolist(), strict=True))
    return {group: norms[group] for group in GROUPS if group in norms}

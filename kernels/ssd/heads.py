"""A mitigation of some heads only. Heads do not meet inside a scan, so each may follow a rule of its own."""

import math
from collections import Counter
from collections.abc import Callable
from copy import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kernels.ssd.core import Tokens
from kernels.ssd.mitigation import FACTORS, NONE, Mitigation

# What leaves a head as it is. hard_reset and sliding_window have nothing such: their heads are scanned apart.
NEUTRAL = {**dict.fromkeys(FACTORS, 1.0), "max_norm": math.inf, "threshold": 0.0}

Scan = Callable[..., tuple[Tensor, Any, Tensor | None]]


def spread(mitigation: Mitigation, count: int, device: torch.device) -> Mitigation:
    """The same with `heads` told in values per head, (count,) float64, wherever there is a neutral value."""
    heads = mitigation.heads
    if heads is None:
        return mitigation
    same = copy(mitigation)  # not made anew: that would read the tensors, and wait for the device
    settings = {name: value for name in NEUTRAL if (value := getattr(mitigation, name)) is not None}
    if len(heads) == count:
        settings = {}
    elif mitigation.window is not None or mitigation.name == "hard_reset":
        return mitigation
    for name, value in settings.items():
        value = per_head(value, count, device, torch.float64)
        object.__setattr__(same, name, torch.where(head_mask(heads, count, device), value, NEUTRAL[name]))
    object.__setattr__(same, "heads", None)
    return same


def per_head(value: float | Tensor, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """One value a head, (count,). A number is filled in: a copy from the host would wait for a GPU."""
    if isinstance(value, Tensor):
        return value.to(device, dtype).expand(count)
    return torch.full((count,), value, device=device, dtype=dtype)


def groups_of(heads: tuple[int, ...], count: int, groups: int) -> tuple[int, ...]:
    """Which groups' B and C some heads read: each group once if it has as many of the heads as the others,
    else one entry a head."""
    own = [head * groups // count for head in heads]
    held = Counter(own)
    return tuple(own if len(set(held.values())) > 1 else held)


def by_heads(
    scan: Scan,
    tokens: Tokens,
    D: Tensor | None,
    state: Any,
    document_starts: Tensor | None,
    position: Tensor | None,
    mitigation: Mitigation,
    states_every: int | None,
) -> tuple[Tensor, Any, Tensor | None]:
    """The heads of the mitigation by one scan, the others by a plain one; arguments as `composed_scan`'s."""
    chosen = mitigation.heads
    if chosen is None:
        return scan(tokens, D, state, document_starts, position, mitigation, states_every)
    count, windowed = tokens.x.shape[2], mitigation.window is not None
    others = tuple(head for head in range(count) if head not in chosen)
    rule = copy(mitigation)
    object.__setattr__(rule, "heads", None)
    results = []
    for heads, own in ((chosen, rule), (others, NONE)):
        index = _index(heads, tokens.x.device)
        before = state
        if state is not None:
            if not windowed:
                before = state.index_select(1, index)
            elif own is NONE:
                before = state.rest
        some = _select(tokens, heads, index)
        skip = None if D is None else D.index_select(0, index)
        results.append(scan(some, skip, before, document_starts, position, own, states_every))
    order = _index(_inverse(chosen + others), tokens.x.device)
    (y, final, states), (y_rest, final_rest, states_rest) = results
    y = torch.cat([y, y_rest], 2).index_select(2, order)
    if windowed:
        final = final._replace(rest=final_rest)
    else:
        final = torch.cat([final, final_rest], 1).index_select(1, order)
    if states is not None and states_rest is not None:
        states = torch.cat([states, states_rest], 2).index_select(2, order)
    return y, final, states


def _select(tokens: Tokens, heads: tuple[int, ...], index: Tensor) -> Tokens:
    """The tokens as some heads see them."""
    x, log_decay, insert = (t.index_select(2, index) for t in tokens[:3])
    B, C = tokens.B, tokens.C
    groups = groups_of(heads, tokens.x.shape[2], B.shape[2])
    if groups != tuple(range(B.shape[2])):
        B, C = (t.index_select(2, _index(groups, t.device)) for t in (B, C))
    return Tokens(x, log_decay, insert, B, C)


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


# Cached: a copy from the host waits for a GPU. Made outside inference mode: training may read them later.
@lru_cache
def _index(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.int64, device=device)


@lru_cache
def head_mask(heads: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([head in heads for head in range(count)], device=device)

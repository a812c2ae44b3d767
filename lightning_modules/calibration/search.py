"""Zeroth-order search: simultaneous perturbation (SPSA) on the logarithms of positive numbers.

All numbers are moved at once, each up or down at random, and the loss is measured on both sides: the
difference tells the step. Two losses a step, however many numbers. MambaExtend (ICLR 2025) and Mamba
Modulation (arXiv 2509.19633) find a factor for every layer so.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Loss = Callable[[list[float]], float]


@dataclass(frozen=True)
class Found:
    """The best factors that were measured, their loss, and that of all factors 1."""

    factors: list[float]
    loss: float
    neutral_loss: float


def search(loss: Loss, size: int, *, evaluations: int, perturbation: float, step: float, seed: int) -> Found:
    """Lower `loss` over `size` positive factors, from 1; the result is never worse than all 1.

    Args:
        loss: of a list of factors; the same factors must give the same loss. NaN or infinity: worse than all.
        evaluations: how often it is called; at least 3.
        perturbation: log factor by which each is moved to both sides.
        step: largest change of a log factor in one step; falls to 0 along a cosine.
    """
    rng = np.random.default_rng(seed)
    place = np.zeros(size)
    neutral = _measure(loss, place)
    best, best_place = neutral, place
    steps, square = (evaluations - 1) // 2, 0.0
    for i in range(steps):
        direction = rng.choice([-1.0, 1.0], size)
        sides = [place + sign * perturbation * direction for sign in (1.0, -1.0)]
        up, down = (_measure(loss, side) for side in sides)
        for value, side in ((up, sides[0]), (down, sides[1])):
            if value < best:
                best, best_place = value, side
        if up == down:  # flat, or infinite on both sides
            continue
        slope = (up - down) / (2 * perturbation)
        if math.isfinite(slope):  # divided by its running size, so that `step` means the same for every loss
            square = slope**2 if square == 0 else 0.9 * square + 0.1 * slope**2
            slope /= math.sqrt(square)
        rate = step * 0.5 * (1 + math.cos(math.pi * i / steps))
        place = place - rate * min(max(slope, -1.0), 1.0) * direction
    if evaluations > 2 * steps + 1 and steps:  # an even number of evaluations leaves one for where it ended
        last = _measure(loss, place)
        if last < best:
            best, best_place = last, place
    return Found(np.exp(best_place).tolist(), best, neutral)


def _measure(loss: Loss, place: np.ndarray) -> float:
    value = loss(np.exp(place).tolist())
    return value if math.isfinite(value) else math.inf

"""What every task is: prompts of an exact length, each a pure function of its random seeds."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.random import Generator

from data.layout import Background, Batch, Ints, Layout, Piece, to_batch


@dataclass(frozen=True)
class Draw:
    """What decides a prompt. Prompts with equal `haystack` share what they can: all but needle or question.

    depth: the range, within [0, 1), in which the place of what is asked for is drawn.
    """

    haystack: tuple[int, ...]
    own: tuple[int, ...]
    depth: tuple[float, float] = (0.0, 1.0)

    def shared(self) -> Generator:
        return np.random.default_rng(self.haystack)

    def private(self) -> Generator:
        return np.random.default_rng(self.own)

    def draw_depth(self, rng: Generator) -> float:
        low, high = self.depth
        return low + (high - low) * float(rng.random())


@dataclass(frozen=True)
class Row:
    """One prompt; see `data.layout.Layout`. Rows of equal `shares` hold the same up to their `branch`."""

    place: int
    pieces: list[Piece]
    shares: Hashable
    branch: int
    depth: float = field(default=float("nan"))


class Task(ABC):
    """A source of training samples, and of prompts to be measured by."""

    filler_weight: float  # loss weight of tokens outside the answer

    @abstractmethod
    def shortest(self) -> int:
        """Tokens below which a prompt may not fit."""

    @abstractmethod
    def chance(self, length: int) -> float:
        """The share of the parts of an answer that a guess gets right which knows the task, not the prompt's
        order: one that names, where answers stand in the prompt, any of what could be asked for."""

    @abstractmethod
    def layout(self, length: int, draws: Sequence[Draw]) -> Layout:
        """Prompts of exactly `length` tokens, at least `shortest()`."""

    def sample(self, length: int, indices: Sequence[int] | Ints, seed: Sequence[int]) -> Batch:
        """Training batch whose row i is a pure function of (seed, indices[i], length); see `to_batch`."""
        draws = [Draw((*seed, int(i), 0), (*seed, int(i), 1)) for i in indices]
        layout = self.layout(length, draws)
        return to_batch(layout.ids(0, length), layout.answer(0, length) > 0, self.filler_weight)

    def position(self, length: int, index: int, seed: Sequence[int]) -> dict[str, float]:
        """Nothing to tell beyond the index: prompts never repeat."""
        return {}


def to_layout(length: int, background: Background, rows: Sequence[Row]) -> Layout:
    number = {shares: i for i, shares in enumerate(dict.fromkeys(row.shares for row in rows))}
    return Layout(
        length=length,
        background=background,
        place=np.array([row.place for row in rows], np.int64),
        pieces=[row.pieces for row in rows],
        group=np.array([number[row.shares] for row in rows], np.int64),
        branch=np.array([row.branch for row in rows], np.int64),
        depth=np.array([row.depth for row in rows]),
    )

"""Prompts not yet written out: a background with pieces in it. Any stretch can be cut from it, in memory that
does not grow with the prompts' length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Batch = dict[str, torch.Tensor]

# Tokens at offsets (n, w) of the backgrounds at places (n,), int64 (n, w). Offsets outside are asked for too,
# where a piece covers them: anything will do there.
Background = Callable[[Ints, Ints], Ints]


@dataclass(frozen=True)
class Piece:
    """Tokens that stand at `start`. parts: 0, or which part of the answer each belongs to, from 1 on.

    skip: tokens of the background left out behind it, so that prompts that begin alike can end alike too.
    """

    start: int
    ids: Ints
    parts: Ints | None = None
    skip: int = 0


@dataclass(frozen=True)
class Layout:
    """n prompts of `length` tokens. But for its skip the background goes on behind a piece where it was.

    Rows of one `group` hold the same tokens up to the nearer of their `branch`es, which all lie before the
    first token of an answer. depth: of what is asked for, a share in [0, 1) of where it could stand;
    NaN where it has no place.
    """

    length: int
    background: Background
    place: Ints  # (n,) the first argument of `background`
    pieces: list[list[Piece]]  # of a row in order of their starts, without overlap
    group: Ints  # (n,)
    branch: Ints  # (n,)
    depth: NDArray[np.float64]  # (n,)

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def parts(self) -> Ints:
        """How many parts each row's answer has, (n,)."""
        largest = [max(p.parts.max(initial=0) for p in row if p.parts is not None) for row in self.pieces]
        return np.array(largest, np.int64)

    def rows(self, index: Sequence[int] | Ints) -> "Layout":
        """Select prompts."""
        return replace(
            self,
            place=self.place[index],
            pieces=[self.pieces[i] for i in index],
            group=self.group[index],
            branch=self.branch[index],
            depth=self.depth[index],
        )

    def ids(self, begin: int, end: int) -> Ints:
        """Tokens [begin, end) of every prompt, (n, end - begin) int64."""
        column = np.arange(begin, end)
        offset = np.empty((len(self), end - begin), np.int64)
        for row, pieces in zip(offset, self.pieces, strict=True):
            row[:] = column
            for piece in pieces:
                if piece.start < end:
                    row[max(0, piece.start - begin) :] -= len(piece.ids) - piece.skip
        ids = self.background(self.place, offset)
        for row, pieces in zip(ids, self.pieces, strict=True):
            for piece in pieces:
                _overlay(row, begin, piece.ids, piece.start)
        return ids

    def answer(self, begin: int, end: int) -> Ints:
        """Which part of its answer each of the tokens [begin, end) belongs to, 0 for none; as `ids`."""
        answer = np.zeros((len(self), end - begin), np.int64)
        for row, pieces in zip(answer, self.pieces, strict=True):
            for piece in pieces:
                if piece.parts is not None:
                    _overlay(row, begin, piece.parts, piece.start)
        return answer


def _overlay(row: NDArray, begin: int, piece: NDArray, start: int) -> None:
    """Write `piece`, which stands at `start`, into `row`, which shows the tokens from `begin` on."""
    low, high = max(start, begin), min(start + len(piece), begin + len(row))
    if low < high:
        row[low - begin : high - begin] = piece[low - start : high - start]


def to_batch(ids: Ints, answer: NDArray[np.bool_], filler_weight: float) -> Batch:
    """Whole prompts as inputs and targets; the last position has no target and no loss.

    Returns ids, targets (n, length) int64, loss_weight (n, length) fp32, answer (n, length) bool; answer and
    loss_weight are of the target at a position.
    """
    targets, answer = np.roll(ids, -1, axis=1), np.roll(answer, -1, axis=1)
    answer[:, -1] = False
    weight = np.where(answer, 1.0, filler_weight).astype(np.float32)
    weight[:, -1] = 0.0
    return {
        "ids": torch.from_numpy(ids),
        "targets": torch.from_numpy(targets),
        "loss_weight": torch.from_numpy(weight),
        "answer": torch.from_numpy(answer),
    }

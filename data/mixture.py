"""Rows of several sources in the ratio of whole-number weights, exact over every prefix to within one row.

Which source row i comes from, and which of its rows that is, are pure functions of i.
"""

from collections.abc import Sequence
from math import gcd

import numpy as np
import torch
from numpy.typing import NDArray

from data.batches import Batch, Source

Ints = NDArray[np.int64]


def schedule(weights: Sequence[int]) -> Ints:
    """The source of each row of one cycle, of sum(weights) rows; cycle follows cycle.

    Tijdeman's rule: of the sources that are due, the one whose next row would be late first. After any
    number of rows no source is a whole row ahead of its share, or behind it.
    """
    total, n = sum(weights), len(weights)
    if n == 1:
        return np.zeros(total, np.int64)
    slack = 2 * n - 2
    share = np.array(weights, np.int64)
    given = np.zeros(n, np.int64)
    order = np.empty(total, np.int64)
    for i in range(total):
        behind = share * (i + 1) - total * given  # rows behind its share, times total
        late = np.where(slack * behind >= total, (total * (slack - 1) - slack * behind) / share, np.inf)
        order[i] = late.argmin()
        given[order[i]] += 1
    return order


class Mixture:
    """A source of rows that reads from several.

    lanes: of sources whose row i goes on where row i - `rows` ended, the tokens of a step of `rows` rows; a
    row then goes on where an earlier step left the same source at the same place. None: rows are independent.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[int], lanes: int | None = None) -> None:
        self.sources, self.lanes = list(sources), lanes
        self.order = schedule(weights)
        self._lanes: dict[tuple[int, int], tuple[Ints, Ints, Ints]] = {}

    def sample(self, length: int, indices: Sequence[int] | Ints, seed: Sequence[int]) -> Batch:
        """Row i is a row of source k, drawn with the seed (*seed, k): see `places`."""
        which, within = self.places(length, np.asarray(indices, np.int64))
        rows: Batch = {}
        for k in np.unique(which).tolist():
            mine = np.flatnonzero(which == k)
            for name, part in self.sources[k].sample(length, within[mine], (*seed, k)).items():
                if name not in rows:
                    rows[name] = torch.empty(len(which), *part.shape[1:], dtype=part.dtype)
                rows[name][torch.from_numpy(mine)] = part
        return rows

    def position(self, length: int, index: int, seed: Sequence[int]) -> dict[str, float]:
        """Which source row `index` is of, and where in that it lies."""
        which, within = self.places(length, np.array([index]))
        k = int(which[0])
        return {"source": k, **self.sources[k].position(length, int(within[0]), (*seed, k))}

    def places(self, length: int, indices: Ints) -> tuple[Ints, Ints]:
        """For each row its source, and its number among that source's rows."""
        lanes = 1 if self.lanes is None else self.lanes // length
        turn, lane = np.divmod(indices, lanes)
        which, within = np.empty_like(indices), np.empty_like(indices)
        for r in np.unique(lane).tolist():
            mine = lane == r
            order, before, total = self._lane(r, lanes)
            cycle, at = np.divmod(turn[mine], len(order))
            which[mine] = order[at]
            within[mine] = (cycle * total[order[at]] + before[at]) * lanes + r
        return which, within

    def _lane(self, lane: int, lanes: int) -> tuple[Ints, Ints, Ints]:
        """Of a cycle of rows lane, lane + lanes, ...: source, earlier rows of it, and rows of each source."""
        if (lane, lanes) not in self._lanes:
            count = len(self.order)
            order = self.order[(np.arange(count // gcd(count, lanes)) * lanes + lane) % count]
            before = np.empty_like(order)
            for k in range(len(self.sources)):
                before[order == k] = np.arange((order == k).sum())
            self._lanes[lane, lanes] = order, before, np.bincount(order, minlength=len(self.sources))
        return self._lanes[lane, lanes]

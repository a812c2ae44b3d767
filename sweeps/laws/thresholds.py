"""Which runs to do next, so that runs are spent where the threshold is.

The threshold of a state size is the shortest training length without collapse. For each size and seed:

1. a coarse test, a few lengths spread over the range: is the outcome monotone in the length?
2. bisection in log length between the longest length that collapses and the shortest that holds. Where the
   test has failed, both ends of the disputed stretch are bisected: the interval stays as wide as the doubt.
3. an end of the range that was never crossed is a censored threshold: known only to lie beyond it.

A run that does not learn its task says nothing: it is tried again with another seed and learning rate, then
counts as missing, and its length is left out.

Pure functions of the outcomes so far: nothing is remembered, so a killed search goes on by itself, and the
order in which runs end changes nothing.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["unsolved", "collapsed", "holds", "missing"]
Settled = Literal["collapsed", "holds", "missing"]


@dataclass(frozen=True, order=True)
class Run:
    """One model to train: attempt 0 is the plan, each further one a retry of an unsolved one."""

    size: str
    seed: int
    length: int
    attempt: int = 0


@dataclass(frozen=True, kw_only=True)
class Search:
    """lengths: the candidates, ascending. coarse: how many of them test monotonicity. attempts: per run."""

    lengths: tuple[int, ...]
    seeds: tuple[int, ...]
    coarse: int = 3
    attempts: int = 3

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """The lengths of the coarse test: both ends, the others nearest to even steps in log length."""
        first, last = math.log(self.lengths[0]), math.log(self.lengths[-1])
        count = min(self.coarse, len(self.lengths))
        aims = [first + (last - first) * i / max(1, count - 1) for i in range(count)]
        return tuple(sorted({_nearest(self.lengths, aim) for aim in aims}))


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A threshold lies in (low, high]. low = 0: left-censored; high = inf: right-censored."""

    low: float
    high: float
    monotone: bool = True

    @property
    def is_censored(self) -> bool:
        return self.low == 0 or math.isinf(self.high)

    @property
    def middle(self) -> float:
        """Geometric, for drawing and first guesses; of a censored one, the end that is known."""
        if self.low == 0 or math.isinf(self.high):
            return self.high if self.low == 0 else self.low
        return math.sqrt(self.low * self.high)


def next_runs(search: Search, sizes: Iterable[str], outcomes: Mapping[Run, Outcome]) -> list[Run]:
    """The runs to do now, those of every size and seed side by side; empty once the search has ended.

    A run without an outcome is proposed again: the caller knows what it has begun.
    """
    runs = []
    for size in sizes:
        for seed in search.seeds:
            known, pending = settle(search, size, seed, outcomes)
            if pending:
                runs += pending
            else:
                runs += [Run(size, seed, length) for length in _wanted(search, known)]
    return runs


def settle(
    search: Search, size: str, seed: int, outcomes: Mapping[Run, Outcome]
) -> tuple[dict[int, Settled], list[Run]]:
    """Length -> what its attempts have come to; and the attempts that unsolved lengths still have."""
    known: dict[int, Settled] = {}
    pending = []
    for length in search.lengths:
        for attempt in range(search.attempts):
            run = Run(size, seed, length, attempt)
            outcome = outcomes.get(run)
            if outcome is None:
                if attempt:
                    pending.append(run)
                break
            if outcome != "unsolved":
                known[length] = outcome
                break
        else:
            known[length] = "missing"
    return known, pending


def interval(known: Mapping[int, Settled]) -> Interval | None:
    """What the settled lengths say of the threshold; None where none of them says anything.

    Not monotone: from the last length that collapses before any holds to the first that holds after all that
    collapse.
    """
    holds = [length for length, outcome in known.items() if outcome == "holds"]
    collapsed = [length for length, outcome in known.items() if outcome == "collapsed"]
    if not holds and not collapsed:
        return None
    first_hold, last_collapse = min(holds, default=math.inf), max(collapsed, default=0)
    return Interval(
        low=max((length for length in collapsed if length < first_hold), default=0),
        high=min((length for length in holds if length > last_collapse), default=math.inf),
        monotone=last_collapse < first_hold,
    )


def _wanted(search: Search, known: Mapping[int, Settled]) -> list[int]:
    """Lengths to settle next: those of the coarse test, then one for each open end of the interval."""
    untested = [length for length in search.test_lengths if length not in known]
    if untested:
        return untested
    open_lengths = [length for length in search.lengths if length not in known]
    found = interval(known)
    if found is None:  # none of the test lengths could be solved: the others, one after the other
        return open_lengths[:1]
    holds = [length for length, outcome in known.items() if outcome == "holds"]
    collapsed = [length for length, outcome in known.items() if outcome == "collapsed"]
    # Where the outcome is monotone both gaps are the same one.
    gaps = {
        (found.low, min((length for length in holds if length > found.low), default=math.inf)),
        (max((length for length in collapsed if length < found.high), default=0), found.high),
    }
    missing = [length for length, outcome in known.items() if outcome == "missing"]
    wanted = {_split(open_lengths, low, high, missing) for low, high in gaps}
    return sorted(length for length in wanted if length is not None)


def _split(open_lengths: list[int], low: float, high: float, missing: list[int]) -> int | None:
    """The length that halves (low, high) in logarithm; beyond an end of what is known, the outermost.

    Where nothing holds and longer lengths were not solved, the halving looks for the longest that can be.
    """
    if math.isinf(high):
        high = min((length for length in missing if length > low), default=math.inf)
    inside = [length for length in open_lengths if low < length < high]
    if not inside:
        return None
    if low == 0:
        return inside[0]
    if math.isinf(high):
        return inside[-1]
    return _nearest(inside, (math.log(low) + math.log(high)) / 2)


def _nearest(lengths: Iterable[int], aim: float) -> int:
    """The length whose logarithm is nearest to `aim`; the shorter of two."""
    return min(lengths, key=lambda length: (abs(math.log(length) - aim), length))

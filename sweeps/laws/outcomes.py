"""What each run of a study of capacity says: unsolved, collapsed or holding; how long a context it recalls.

The criterion of arXiv 2410.07145 for passkey training: exact match on needles within the last training length
stays at 0.9 of its in-length value or better at every length to 64x. The measured shares decide, on prompts
that ask the same questions over the same last tokens at every length. How likely fresh prompts are to decide
otherwise is kept beside it as `doubt`: it widens the intervals of what is fitted, and the table shows it.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from conf.capacity import CapacityConfig
from sweeps.laws.thresholds import Interval, Outcome, Run
from sweeps.results import Measured, Share

Z = 1.959964  # a Share's interval is a 95% one


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One finished run. worst: the length beyond training at which recent needles are found least often."""

    run: Run
    measured: Measured
    outcome: Outcome
    in_length: float
    worst: int
    doubt: float
    recalled: Interval | None

    @cached_property
    def worst_exact(self) -> float:
        return self.measured.recent[self.worst].exact

    @property
    def recent_in_length(self) -> float:
        return self.measured.recent[self.measured.train_length].exact

    def redraw(self, generator: np.random.Generator) -> Outcome:
        """The outcome as other prompts might have given it."""
        if self.outcome == "unsolved" or generator.random() >= self.doubt:
            return self.outcome
        return "holds" if self.outcome == "collapsed" else "collapsed"


def judge(run: Run, measured: Measured, settings: CapacityConfig) -> Judged:
    """Raises ValueError where the evaluation lacks recent needles beyond the training length."""
    beyond = {n: share for n, share in measured.recent.items() if n > measured.train_length}
    if not beyond or measured.in_length is None:
        raise ValueError(
            f"{measured.run_dir}: no passkey lengths beyond {measured.train_length} were measured"
        )
    inside = measured.recent[measured.train_length]
    bar = settings.holds * inside.exact
    worst = min(beyond, key=lambda n: (beyond[n].exact, n))
    solved = measured.in_length >= settings.solved
    holds = beyond[worst].exact >= bar
    return Judged(
        run=run,
        measured=measured,
        outcome="unsolved" if not solved else "holds" if holds else "collapsed",
        in_length=measured.in_length,
        worst=worst,
        doubt=_doubt(beyond[worst], inside, settings.holds),
        recalled=_recalled(measured.recall, settings.recalled) if solved else None,
    )


def longest(recalled: list[Interval]) -> Interval | None:
    """The maximum over training lengths of contexts that are known to lie in intervals."""
    if not recalled:
        return None
    return Interval(low=max(one.low for one in recalled), high=max(one.high for one in recalled))


def _doubt(worst: Share, inside: Share, holds: float) -> float:
    """Chance that fresh prompts put the worst share on the other side of its bar, at most one half."""
    deviation = math.hypot(_deviation(worst), holds * _deviation(inside))
    distance = abs(worst.exact - holds * inside.exact)
    return 0.5 * math.erfc(distance / deviation / math.sqrt(2))


def _deviation(share: Share) -> float:
    return max(1e-9, (share.high - share.low) / (2 * Z))


def _recalled(recall: dict[int, Share], bar: float) -> Interval | None:
    """The longest context found above the bar, every shorter one measured being above it too: it lies between
    that and the next length. Above it everywhere: censored at the evaluation's ceiling."""
    low, high = 0.0, math.inf
    for length, share in sorted(recall.items()):
        if share.exact <= bar:
            high = float(length)
            break
        low = float(length)
    return Interval(low=low, high=high) if recall else None

"""What each run of a study of capacity says: unsolved, collapsed or holding; how long a context it recalls.

Two criteria, both of arXiv 2410.07145; what the runs train on chooses between them (`criterion_of`).

Passkey models: exact match on needles within the last training length stays at 0.9 of its in-length value
or better at every length to 64x. Prompts of all lengths ask the same questions over the same last tokens.

Language models: the loss at every position of long prompts stays within twice its maximum in length. As the
loss suite has it: in length the highest of its buckets of positions; beyond, means over stretches of one
training length, so that a hard passage of text is not taken for a collapse. One whose loss in length is not
below that of the token frequencies of these very texts has learnt nothing of language: unsolved.

What is measured decides. How likely fresh prompts are to decide otherwise is kept beside it as `doubt`: it
widens the intervals of what is fitted, and the table shows it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from conf.capacity import CapacityConfig
from conf.sweep_schema import SweepConfig, train_base
from lightning_modules.evaluation.conclusion import stretches
from sweeps.laws.thresholds import Interval, Outcome, Run
from sweeps.reports.results import Measured, Share

Z = 1.959964  # a Share's interval is a 95% one


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One finished run.

    in_length: exact match over all depths at the training length, or the mean loss within it.
    inside: what the bar is set by: recent exact match at the training length, or the highest loss within it.
    beyond: recent exact match, or loss, at `worst`, where it is worst beyond the training length.
    kept: 1 where nothing is lost beyond, 0 where all is.
    reach: the furthest position that was asked.
    """

    run: Run
    measured: Measured
    outcome: Outcome
    in_length: float
    inside: float
    beyond: float
    worst: int
    kept: float
    reach: int
    doubt: float
    recalled: Interval | None = None

    def redraw(self, generator: np.random.Generator) -> Outcome:
        """The outcome as other prompts might have given it."""
        if self.outcome == "unsolved" or generator.random() >= self.doubt:
            return self.outcome
        return "holds" if self.outcome == "collapsed" else "collapsed"


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """How runs are judged, and what a report calls what they are judged by."""

    judge: Callable[[Run, Measured, CapacityConfig], Judged]
    has_recall: bool  # whether needles are asked for at all
    title: str
    kept: str
    in_length: str
    beyond: str
    columns: tuple[str, str, str]  # in results.csv: in_length, inside, beyond


def criterion_of(config: SweepConfig) -> Criterion:
    return LOSS if train_base(config).data.name == "documents" else NEEDLES


def judge_needles(run: Run, measured: Measured, settings: CapacityConfig) -> Judged:
    """Raises ValueError where the evaluation lacks recent needles beyond the training length."""
    shares = {n: share for n, share in measured.recent.items() if n > measured.train_length}
    if not shares or measured.in_length is None:
        raise ValueError(
            f"{measured.run_dir}: no passkey lengths beyond {measured.train_length} were measured"
        )
    inside = measured.recent[measured.train_length]
    bar = settings.holds * inside.exact
    worst = min(shares, key=lambda n: (shares[n].exact, n))
    beyond = shares[worst]
    solved = measured.in_length >= settings.solved
    deviation = math.hypot(_deviation(beyond), settings.holds * _deviation(inside))
    return Judged(
        run=run,
        measured=measured,
        outcome="unsolved" if not solved else "holds" if beyond.exact >= bar else "collapsed",
        in_length=measured.in_length,
        inside=inside.exact,
        beyond=beyond.exact,
        worst=worst,
        kept=min(1.0, beyond.exact / inside.exact) if inside.exact else 0.0,
        reach=max(shares),
        doubt=_doubt(beyond.exact - bar, deviation),
        recalled=_recalled(measured.recall, settings.recalled) if solved else None,
    )


def judge_loss(run: Run, measured: Measured, settings: CapacityConfig) -> Judged:
    """Raises ValueError where the evaluation lacks losses beyond the training length, or their noise."""
    loss, length = measured.loss, measured.train_length
    if loss is None or loss.get("unigram") is None or loss["prompts"] < 2:
        raise ValueError(f"{measured.run_dir}: no losses of several prompts of text were measured")
    position = np.array(loss["position"])
    stretch, inside = stretches(position, length), position <= length
    if inside.all():
        raise ValueError(
            f"{measured.run_dir}: no losses beyond {length} tokens were measured: too little text"
        )
    values = np.array([math.inf if value is None else value for value in loss["loss"]])
    errors = np.array([0.0 if value is None else value for value in loss["error"]])
    # The error of a stretch's mean is at most the mean of its buckets' errors.
    means = {
        i: (values[stretch == i].mean(), errors[stretch == i].mean()) for i in np.unique(stretch[~inside])
    }
    worst = max(means, key=lambda i: (means[i][0], -i))
    (beyond, error), highest = means[worst], int(np.argmax(np.where(inside, values, -math.inf)))
    in_length, top = float(values[inside].mean()), float(values[highest])
    bar = settings.loss_factor * top
    solved, holds = in_length < loss["unigram"], beyond <= bar
    return Judged(
        run=run,
        measured=measured,
        outcome="unsolved" if not solved else "holds" if holds else "collapsed",
        in_length=in_length,
        inside=top,
        beyond=float(beyond),
        worst=round(float(position[stretch == worst].mean())),
        kept=min(1.0, top / beyond) if solved else 0.0,
        reach=loss["length"],
        doubt=_doubt(beyond - bar, math.hypot(error, settings.loss_factor * errors[highest]))
        if solved
        else 0.0,
    )


NEEDLES = Criterion(
    judge=judge_needles,
    has_recall=True,
    title="Recent needles beyond the training length",
    kept="worst exact match to 64x\nover its in-length value",
    in_length="exact match\nin length",
    beyond="worst recent\nexact match",
    columns=("in_length_exact", "recent_in_length", "worst_recent"),
)
LOSS = Criterion(
    judge=judge_loss,
    has_recall=False,
    title="Loss beyond the training length",
    kept="in-length maximum of the loss\nover its highest to 64x",
    in_length="loss\nin length",
    beyond="highest loss\nbeyond",
    columns=("in_length_loss", "in_length_max_loss", "worst_loss"),
)


def longest(recalled: list[Interval]) -> Interval | None:
    """The maximum over training lengths of contexts that are known to lie in intervals."""
    if not recalled:
        return None
    return Interval(low=max(one.low for one in recalled), high=max(one.high for one in recalled))


def _doubt(distance: float, deviation: float) -> float:
    """Chance that fresh prompts put what is worst on the other side of its bar, at most one half."""
    return 0.5 * math.erfc(abs(distance) / max(deviation, 1e-9) / math.sqrt(2))


def _deviation(share: Share) -> float:
    return (share.high - share.low) / (2 * Z)


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

"""Fits of a law to thresholds that are known to lie in intervals, and what may be concluded.

A threshold of one size and seed is log-normal around the law: log T = log f(N) + sigma e. Where f is below
one token, as a line with a negative intercept may be, one token stands for "no length collapses". The
likelihood of an interval (low, high] is the probability of falling into it; a censored one reaches to 0 or
infinity. So neither the grid of lengths nor a threshold outside the range has to be replaced by a number.

Seeds of one size are the unit that is resampled: within each size, with replacement.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sweeps.laws.forms import FORMS, Floats, Form
from sweeps.laws.thresholds import Interval

MIN_SIZES = 6  # uncensored ones, below which forms are not told apart
MIN_DELTA = 4.0  # AICc by which the best form must lead
MIN_WINS = 0.95  # share of resamples in which it must be the best
SIGMA_RANGE = (0.02, 3.0)  # of log T; intervals narrower than its lower end are not resolved
INDISTINGUISHABLE = "not distinguishable"


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Of one size and seed. n: elements of state, counted one way."""

    size: str
    seed: int
    n: float
    interval: Interval


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One form at its maximum of likelihood. parameters: in tokens and elements of state over `scale`."""

    form: Form
    scale: float
    parameters: tuple[float, ...]
    sigma: float
    log_likelihood: float
    aicc: float

    def tokens(self, n: Floats) -> Floats:
        return self.form.tokens(np.asarray(n, float) / self.scale, np.array(self.parameters))

    def residual(self, threshold: Threshold) -> float:
        """log2 of the interval's middle over the law: octaves."""
        law = max(1.0, float(self.tokens(np.array([threshold.n]))[0]))
        return math.log2(threshold.interval.middle / law)


@dataclass(frozen=True, kw_only=True)
class Law:
    """All forms fitted to the same thresholds, the best first.

    resampled: form -> a fit for every resample. wins: share of resamples in which a form is the best.
    """

    thresholds: list[Threshold]
    fits: list[Fit]
    resampled: dict[str, list[Fit]] = field(default_factory=dict)
    wins: dict[str, float] = field(default_factory=dict)

    @property
    def best(self) -> Fit | None:
        return self.fits[0] if self.fits else None

    def fit(self, name: str) -> Fit | None:
        return next((fit for fit in self.fits if fit.form.name == name), None)

    def band(self, name: str, n: Floats) -> tuple[Floats, Floats] | None:
        """Pointwise 95% interval of the law over resampled seeds; None without any."""
        fit, again = self.fit(name), self.resampled.get(name)
        if fit is None or not again:
            return None
        return self._interval(fit.tokens(n), np.array([one.tokens(n) for one in again]))

    def parameter_intervals(self, name: str) -> list[tuple[float, float]] | None:
        """95% interval of each parameter of a form over resampled seeds; None without any."""
        fit, again = self.fit(name), self.resampled.get(name)
        if fit is None or not again:
            return None
        low, high = self._interval(np.array(fit.parameters), np.array([one.parameters for one in again]))
        return list(zip(low.tolist(), high.tolist(), strict=True))

    def _interval(self, estimate: Floats, resampled: Floats) -> tuple[Floats, Floats]:
        """Quantiles of the resamples, spread out around the estimate: drawing n seeds from n with replacement
        has (n - 1) / n of the variance of new seeds, which tells with three."""
        seeds = len(self.thresholds) / len({threshold.size for threshold in self.thresholds})
        wider = math.sqrt(seeds / (seeds - 1)) if seeds > 1 else 1.0
        low, high = np.quantile(estimate + wider * (resampled - estimate), [0.025, 0.975], axis=0)
        return low, high

    @property
    def uncensored_sizes(self) -> int:
        return count_uncensored(self.thresholds)

    @property
    def verdict(self) -> str:
        """One sentence: which form, or why none can be named."""
        if self.uncensored_sizes < MIN_SIZES:
            return (
                f"{INDISTINGUISHABLE}: {self.uncensored_sizes} state sizes have an uncensored threshold, "
                f"{MIN_SIZES} are needed."
            )
        best, second = self.fits[0], self.fits[1]
        lead, wins = second.aicc - best.aicc, self.wins.get(best.form.name, 0.0)
        said = (
            f"{best.form.name} leads {second.form.name} by {lead:.1f} in AICc and is the best form in "
            f"{wins:.0%} of resamples"
        )
        if lead < MIN_DELTA or wins < MIN_WINS:
            return f"{INDISTINGUISHABLE}: {said}; {MIN_DELTA:g} and {MIN_WINS:.0%} are needed."
        return f"{best.form.name}: {said}."


def count_uncensored(thresholds: Sequence[Threshold]) -> int:
    """Sizes of which more than half of the seeds have an uncensored threshold."""
    by_size: dict[str, list[bool]] = {}
    for threshold in thresholds:
        by_size.setdefault(threshold.size, []).append(not threshold.interval.is_censored)
    return sum(sum(known) * 2 > len(known) for known in by_size.values())


Redraw = Callable[[np.random.Generator], list[Threshold]]


def fit_law(
    thresholds: Sequence[Threshold],
    resamples: int = 200,
    seed: int = 0,
    redraw: Redraw | None = None,
    forms: Sequence[str] = tuple(FORMS),
) -> Law:
    """Fit every form that has fewer parameters than the data has sizes, and refit it to resampled seeds.

    redraw: thresholds as they might have come out with other prompts; resampled in place of `thresholds`.
    """
    thresholds = list(thresholds)
    sizes = len({threshold.n for threshold in thresholds})
    if count_uncensored(thresholds) == 0:  # only bounds: any curve between them would do
        return Law(thresholds=thresholds, fits=[])
    chosen = [FORMS[name] for name in forms if len(FORMS[name].parameters) < max(2, sizes)]
    fits = sorted((_fit(form, thresholds) for form in chosen), key=_rank)
    resampled: dict[str, list[Fit]] = {fit.form.name: [] for fit in fits}
    wins = dict.fromkeys(resampled, 0)
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        drawn = _resample(thresholds if redraw is None else redraw(generator), generator)
        again = [_fit(fit.form, drawn, start=fit) for fit in fits]
        for fit in again:
            resampled[fit.form.name].append(fit)
        wins[min(again, key=_rank).form.name] += 1
    shares = {name: count / resamples for name, count in wins.items()} if resamples else {}
    return Law(thresholds=thresholds, fits=fits, resampled=resampled if resamples else {}, wins=shares)


def _rank(fit: Fit) -> tuple[float, float]:
    """The best form first; by likelihood alone where there are too few thresholds for AICc."""
    return fit.aicc, -fit.log_likelihood


def _resample(thresholds: Sequence[Threshold], generator: np.random.Generator) -> list[Threshold]:
    by_size: dict[str, list[Threshold]] = {}
    for threshold in thresholds:
        by_size.setdefault(threshold.size, []).append(threshold)
    return [group[i] for group in by_size.values() for i in generator.integers(len(group), size=len(group))]


def _fit(form: Form, thresholds: Sequence[Threshold], start: Fit | None = None) -> Fit:
    """start: a fit of the same form to begin from; without one, the form's own guesses are tried."""
    n = np.array([threshold.n for threshold in thresholds])
    scale = start.scale if start else float(np.exp(np.log(n).mean()))
    with np.errstate(divide="ignore"):
        low, high = (
            np.log([getattr(threshold.interval, end) for threshold in thresholds]) for end in ("low", "high")
        )
    positive = np.array(form.positive)

    def decode(values: NDArray[np.float64]) -> tuple[Floats, float]:
        parameters = values[:-1].copy()
        parameters[positive] = np.exp(np.clip(parameters[positive], -50, 50))
        return parameters, float(np.exp(np.clip(values[-1], *np.log(SIGMA_RANGE))))

    def cost(values: NDArray[np.float64]) -> float:
        parameters, sigma = decode(values)
        law = np.log(np.maximum(1.0, form.tokens(n / scale, parameters)))
        # A pull of nothing on sigma where the data do not see it, so that the search does not drift.
        outside = values[-1] - np.clip(values[-1], *np.log(SIGMA_RANGE))
        return -float(_log_probability((low - law) / sigma, (high - law) / sigma).sum()) + outside**2

    if start is not None:
        guesses = [[*start.parameters]]
        sigmas = [start.sigma]
    else:
        middle = np.array([threshold.interval.middle for threshold in thresholds])
        guesses, sigmas = form.starts(n / scale, middle), [0.2, 0.7]
    found = []
    for guess in guesses:
        for sigma in sigmas:
            values = np.array([*guess, math.log(sigma)])
            values[:-1][positive] = np.log(np.maximum(values[:-1][positive], 1e-12))
            found.append(_minimise(cost, values, step=0.2))
    best = min(found, key=lambda end: end.fun).x
    if start is None:  # a simplex may have stopped on a kink: again from where the best one ended
        for step in (0.1, 0.05):
            best = _minimise(cost, best, step).x
    parameters, sigma = decode(best)
    log_likelihood = -cost(best)
    return Fit(
        form=form,
        scale=scale,
        parameters=tuple(float(value) for value in parameters),
        sigma=sigma,
        log_likelihood=log_likelihood,
        aicc=_aicc(log_likelihood, len(parameters) + 1, len(thresholds)),
    )


def _minimise(cost: Callable[[Floats], float], values: Floats, step: float) -> Any:
    """The simplex search needs no gradient: a clipped law has kinks. Its first steps are of the size of the
    values."""
    from scipy.optimize import minimize  # 0.4 s that the start of a sweep need not wait for

    simplex = np.vstack([values, values + np.diag(np.maximum(step * np.abs(values), step))])
    options = {"initial_simplex": simplex, "xatol": 1e-4, "fatol": 1e-5, "maxiter": 1000, "maxfev": 2000}
    return minimize(cost, values, method="Nelder-Mead", options=options)


def _log_probability(low: Floats, high: Floats) -> Floats:
    """log(Phi(high) - Phi(low)) without cancellation in either tail."""
    low, high = np.where(low > 0, -high, low), np.where(low > 0, -low, high)  # into the left tail
    from scipy.special import log_ndtr  # a worker imports this module, and fits nothing

    upper, lower = log_ndtr(high), log_ndtr(low)
    gap = np.minimum(lower - upper, -1e-12)
    return upper + np.log1p(-np.exp(gap))


def _aicc(log_likelihood: float, parameters: int, observations: int) -> float:
    """Akaike's criterion, corrected for few observations; infinite where they are too few to say."""
    spare = observations - parameters - 1
    if spare <= 0:
        return math.inf
    return 2 * parameters - 2 * log_likelihood + 2 * parameters * (parameters + 1) / spare

"""The forms a law may have: threshold in tokens as a function of the state size, and the paper's own fits.

x is the state size over a scale of the data, so that every parameter is of the order of a threshold or of 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LARGEST_EXPONENT = 50.0  # e^50 tokens is beyond every threshold: nothing overflows


@dataclass(frozen=True, kw_only=True)
class Form:
    """tokens(x, parameters). starts(x, t): first guesses from thresholds t, as many as a search may need.

    positive: which parameters must be above 0; they are searched as logarithms.
    """

    name: str
    words: str
    parameters: tuple[str, ...]
    positive: tuple[bool, ...]
    tokens: Callable[[Floats, Floats], Floats]
    starts: Callable[[Floats, Floats], list[list[float]]]


def _line(x: Floats, t: Floats) -> tuple[float, float]:
    """Least squares of t = a x + b; the mean where there is one x only."""
    if np.ptp(x) == 0:
        return float(t.mean() / x.mean()), 0.0
    slope, intercept = np.polyfit(x, t, 1)
    return float(slope), float(intercept)


def _power_start(x: Floats, t: Floats) -> list[float]:
    p, log_a = _line(np.log(x), np.log(t))
    return [float(np.exp(log_a)), p]


def _exponential_starts(x: Floats, t: Floats) -> list[list[float]]:
    """For some rates, the line in (e^(kx) - 1) / k through the data."""
    starts = []
    for k in (0.03, 0.3, 1.0, 3.0):
        a, c = _line(np.expm1(k * x) / k, t)
        starts.append([max(a, 1e-3 * float(t.mean())), k, c])
    return starts


FORMS = {
    form.name: form
    for form in (
        Form(
            name="constant",
            words="T = a",
            parameters=("a",),
            positive=(True,),
            tokens=lambda x, p: np.full_like(x, p[0]),
            starts=lambda x, t: [[float(np.exp(np.log(t).mean()))]],
        ),
        Form(
            name="proportional",
            words="T = a N",
            parameters=("a",),
            positive=(True,),
            tokens=lambda x, p: p[0] * x,
            starts=lambda x, t: [[float(np.exp(np.log(t / x).mean()))]],
        ),
        Form(
            name="linear",
            words="T = a N + b",
            parameters=("a", "b"),
            positive=(False, False),
            tokens=lambda x, p: p[0] * x + p[1],
            starts=lambda x, t: [list(_line(x, t)), [float((t / x).mean()), 0.0], [0.0, float(t.mean())]],
        ),
        Form(
            name="logarithmic",
            words="T = a ln N + b",
            parameters=("a", "b"),
            positive=(False, False),
            tokens=lambda x, p: p[0] * np.log(x) + p[1],
            starts=lambda x, t: [list(_line(np.log(x), t)), [0.0, float(t.mean())]],
        ),
        Form(
            name="power",
            words="T = a N^p",
            parameters=("a", "p"),
            positive=(True, False),
            tokens=lambda x, p: p[0] * np.exp(np.clip(p[1] * np.log(x), -50, LARGEST_EXPONENT)),
            starts=lambda x, t: [_power_start(x, t)],
        ),
        Form(
            name="exponential",
            # The paper's a (b^N - 1) + c with b = e^k and its a written a / k: a line as k goes to 0.
            words="T = a (e^(k N) - 1) / k + c",
            parameters=("a", "k", "c"),
            positive=(True, True, False),
            tokens=lambda x, p: p[0] * np.expm1(np.minimum(p[1] * x, LARGEST_EXPONENT)) / p[1] + p[2],
            starts=_exponential_starts,
        ),
    )
}

K, M = 1024.0, 1e6  # the paper's units: K tokens, M elements of state


@dataclass(frozen=True, kw_only=True)
class Published:
    """A law of arXiv 2410.07145 and the points behind it: (state elements, tokens), read off a plot.

    N counts SSM and convolution states. Its thresholds lie on a grid of powers of two, so each is uncertain
    by up to a factor of 2; fitted with a point (0, 0) that was not measured.
    """

    words: str
    tokens: Callable[[Floats], Floats]
    points: tuple[tuple[float, float], ...]
    note: str


PAPER = {
    "forget": Published(
        words="T = 5.172 N - 4.469 (K tokens, M elements)",
        tokens=lambda n: (5.172 * n / M - 4.469) * K,
        points=tuple((n * M, t * K) for n, t in ((1.1, 1), (1.6, 2), (2.4, 8), (4.8, 16), (12.9, 64))),
        note="negative below 0.864M elements, where it says nothing",
    ),
    "recall": Published(
        words="T = 4.756 (1.365^N - 1) - 0.742 (K tokens, M elements)",
        tokens=lambda n: (4.756 * (1.365 ** np.minimum(n / M, 100.0) - 1) - 0.742) * K,
        points=tuple((n * M, t * K) for n, t in ((1.1, 1), (1.6, 2), (2.4, 4), (4.8, 16), (12.9, 256))),
        note="the largest point equals its evaluation's ceiling; negative below 0.466M elements",
    ),
}

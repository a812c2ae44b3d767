"""The laws drawn: thresholds with their fits, and what the fits leave over."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lightning_modules.figures import COLOURS, GREY, short_number
from sweeps.laws.capacity import COUNTS, Count, Kind
from sweeps.laws.fits import Law
from sweeps.laws.forms import PAPER, M

Laws = dict[tuple[Kind, Count], Law]
TITLES: dict[Kind, str] = {"forget": "T_forget", "recall": "T_recall"}
AXES: dict[Kind, str] = {
    "forget": "shortest training length\nwithout collapse (tokens)",
    "recall": "longest context recalled (tokens)",
}
DRAWN = ("linear", "exponential")  # the paper's two forms; the best of the others joins them


def laws_figure(series: str, laws: Laws) -> Figure:
    """Thresholds of every seed, fits with intervals; the paper's law and points where it counts alike."""
    kinds = _kinds(laws)
    figure = Figure(figsize=(10.4, 4.5 * len(kinds)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"Laws of capacity, {series}", fontsize=12, x=0.02, ha="left")
    panels = figure.subplots(len(kinds), 2, squeeze=False)
    for row, kind in enumerate(kinds):
        for column, count in enumerate(COUNTS):
            _draw_law(panels[row][column], kind, count, laws[kind, count])
    return figure


def _kinds(laws: Laws) -> list[Kind]:
    return [kind for kind in TITLES if (kind, "total") in laws]


def _draw_law(axes: Axes, kind: Kind, count: Count, law: Law) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.set_title(f"{TITLES[kind]}: {COUNTS[count]}", fontsize=10, loc="left")
    if law.thresholds:
        _draw_thresholds(axes, law)
        _draw_fits(axes, law)
    if count == "total":
        published = PAPER[kind]
        n, t = np.array(published.points).T
        axes.plot(n, t, "k*", markersize=8, label="the paper's points", zorder=3)
        grid = np.geomspace(n[0] * 0.5, n[-1] * 1.5, 400)
        curve = published.tokens(grid)
        axes.plot(grid[curve > 64], curve[curve > 64], "k--", linewidth=1, label="the paper's law")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    size_axis(axes)
    axes.set_ylabel(AXES[kind])
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)
    lowest = [t.interval.low or t.interval.high for t in law.thresholds]
    axes.set_ylim(bottom=max(1.0, min(lowest, default=256) / 4))


def size_axis(axes: Axes) -> None:
    """State sizes in elements: 2K, 50K, 1M; with 1, 2, 5 of each decade where there are few decades."""
    low, high = axes.get_xlim()
    steps = (1.0,) if high / low > 300 else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _elements(n)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("N_S (elements of state)")


def _elements(n: float) -> str:
    return f"{n / M:g}M" if n >= M else f"{n / 1e3:g}K" if n >= 1e3 else f"{n:g}"


def _draw_thresholds(axes: Axes, law: Law) -> None:
    """A bar from low to high for each seed, side by side; an arrow where it is only known to lie beyond."""
    seeds = sorted({threshold.seed for threshold in law.thresholds})
    for threshold in law.thresholds:
        aside = 1 + 0.05 * (seeds.index(threshold.seed) - (len(seeds) - 1) / 2)
        x, known = threshold.n * aside, threshold.interval
        style: dict[str, Any] = {"color": GREY, "linewidth": 1.3, "zorder": 2}
        if not known.is_censored:
            axes.plot([x, x], [known.low, known.high], **style)
            axes.plot(x, known.middle, "o", color=GREY, markersize=3, zorder=2)
            continue
        marker, y = ("^", known.low) if math.isinf(known.high) else ("v", known.high)
        axes.plot(x, max(1.0, y), marker, color=GREY, markersize=6, markerfacecolor="white", zorder=2)


def _draw_fits(axes: Axes, law: Law) -> None:
    sizes = [threshold.n for threshold in law.thresholds]
    grid = np.geomspace(min(sizes) * 0.8, max(sizes) * 1.25, 200)
    for i, name in enumerate(_drawn(law)):
        fit, band = law.fit(name), law.band(name, grid)
        if fit is None:
            continue
        line = np.maximum(fit.tokens(grid), 1.0)
        axes.plot(
            grid, line, color=COLOURS[i], linewidth=1.8, label=f"{name} (AICc {fit.aicc:.1f})", zorder=4
        )
        if band is not None:
            low, high = (np.maximum(edge, 1.0) for edge in band)
            axes.fill_between(grid, low, high, color=COLOURS[i], alpha=0.15, linewidth=0)


def _drawn(law: Law) -> list[str]:
    best = [law.best.form.name] if law.best else []
    return list(dict.fromkeys([*DRAWN, *best]))


def residuals(series: str, laws: Laws) -> Figure:
    """Octaves between thresholds and fits: a form that bends away shows a slope here."""
    kinds = _kinds(laws)
    figure = Figure(figsize=(10.4, 3.0 * len(kinds)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"Residuals, {series} (N_S: {COUNTS['total']})", fontsize=12, x=0.02, ha="left")
    panels = figure.subplots(len(kinds), 2, squeeze=False, sharex="row", sharey="row")
    for row, kind in enumerate(kinds):
        law = laws[kind, "total"]
        for column, name in enumerate(DRAWN):
            axes, fit = panels[row][column], law.fit(name)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xscale("log")
            axes.axhline(0, color=GREY, linewidth=1)
            axes.set_title(f"{TITLES[kind]}, {name}", fontsize=10, loc="left")
            for threshold in law.thresholds if fit else ():
                assert fit is not None
                aside = 1.03 ** (threshold.seed - min(t.seed for t in law.thresholds))
                censored = threshold.interval.is_censored
                marker = "o" if not censored else "^" if math.isinf(threshold.interval.high) else "v"
                face = "white" if censored else COLOURS[column]
                y = fit.residual(threshold)
                axes.plot(
                    threshold.n * aside, y, marker, color=COLOURS[column], markerfacecolor=face, markersize=5
                )
            if fit is None:
                axes.text(0.5, 0.6, "no fit: too few thresholds", transform=axes.transAxes, ha="center")
            size_axis(axes)
            axes.set_ylabel("octaves above the fit" if column == 0 else "")
            axes.set_xlabel(
                f"{axes.get_xlabel()}\nhollow: censored, at its known end" if kind == kinds[-1] else ""
            )
        reach = max(1.0, *(abs(edge) for edge in panels[row][0].get_ylim()))
        panels[row][0].set_ylim(-reach, reach)
    return figure

"""The runs of a study of capacity drawn: the surface, what decides, and every run."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_modules.figures import COLOURS, short_number
from sweeps.laws.capacity import Capacity
from sweeps.laws.importance import Factor, factors, shares
from sweeps.laws.outcomes import Judged

OUTCOMES = {"holds": COLOURS[2], "collapsed": COLOURS[1], "unsolved": "#AAAAAA"}


def surface(found: Capacity, series: str) -> Figure:
    """Training length against state size: how many seeds hold, and how far recent accuracy falls."""
    sizes = [size for size in found.sizes if series in size.series]
    lengths = found.search.lengths
    kept = np.full((len(sizes), len(lengths)), np.nan)
    words = np.full(kept.shape, "", dtype=object)
    for row, size in enumerate(sizes):
        for column, length in enumerate(lengths):
            runs = [j for j in found.judged.values() if (j.run.size, j.run.length) == (size.key, length)]
            solved = [judged for judged in runs if judged.outcome != "unsolved"]
            if solved:
                holding = sum(judged.outcome == "holds" for judged in solved)
                kept[row, column] = np.mean([judged.kept for judged in solved])
                words[row, column] = f"{holding}/{len(solved)}"
            elif runs:
                words[row, column] = "unsolved"
    height = max(3.6, 2.2 + 0.42 * len(sizes))
    figure, axes = _figure(f"{found.criterion.title}, {series}", 8.2, height)
    image = axes.imshow(kept, cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="lower")
    for (row, column), text in np.ndenumerate(words):
        bright = np.isfinite(kept[row, column]) and kept[row, column] > 0.55
        colour = "black" if bright or text == "unsolved" else "white"
        style: dict[str, Any] = {"rotation": 45, "fontsize": 7} if text == "unsolved" else {"fontsize": 9}
        axes.text(column, row, text, ha="center", va="center", color=colour, **style)
    axes.set_xticks(range(len(lengths)), [short_number(n) for n in lengths])
    axes.set_yticks(range(len(sizes)), [f"{size.total:,}  ({size.key})" for size in sizes])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(
        "training length (tokens)\nin the cells: seeds that hold / seeds solved; empty: not needed"
    )
    axes.set_ylabel("state size N_S, SSM and convolution")
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(found.criterion.kept)
    bar.outline.set_visible(False)
    return figure


def importances(found: Capacity) -> Figure:
    """Share of the variance of each measure that one setting alone explains."""
    measures: dict[str, Callable[[Judged], float]] = {
        found.criterion.kept.replace("\n", " "): lambda judged: judged.kept,
        found.criterion.in_length.replace("\n", " "): lambda judged: judged.in_length,
    }
    names = list(factors(found))
    figure, axes = _figure(
        "What decides: share of the variance that a setting alone explains", 7.5, 1.8 + 0.5 * len(names)
    )
    for i, (title, measure) in enumerate(measures.items()):
        values = shares(found, measure)
        y = np.arange(len(names)) + 0.2 * (1 - 2 * i)
        axes.barh(y, [values[name] for name in names], height=0.36, color=COLOURS[i], label=title)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 1)
    axes.set_xlabel("eta squared; runs are where the search wanted them, so shares are of these runs")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def parallel_coordinates(found: Capacity) -> Figure:
    """A line for every run, by outcome: settings on the left, what came out on the right."""
    columns: list[tuple[str, Factor]] = list(factors(found).items())
    results: list[tuple[str, Factor]] = [
        (found.criterion.in_length, lambda judged: judged.in_length),
        (found.criterion.beyond, lambda judged: judged.beyond),
    ]
    width = 1.8 * (len(columns) + len(results))
    figure, axes = _figure("Every run", max(7.0, width), 4.6)
    scaled = []
    for position, (_, read) in enumerate([*columns, *results]):
        values = [read(judged) for judged in found.judged.values()]
        is_result = position >= len(columns)
        levels = _ends(values) if is_result else sorted(set(values))
        place = _scale(levels, even=not is_result)
        scaled.append([place(value) for value in values])
        axes.axvline(position, color="#BBBBBB", linewidth=1, zorder=1)
        for level in levels:
            label = f"{level:.2g}" if isinstance(level, float) and level < 10 else short_number(level)
            axes.annotate(
                label, (position, place(level)), xytext=(4, 2), textcoords="offset points", fontsize=7
            )
    generator = np.random.default_rng(0)
    for i, judged in enumerate(found.judged.values()):
        jitter = generator.uniform(-0.012, 0.012, len(scaled))
        y = [column[i] + aside for column, aside in zip(scaled, jitter, strict=True)]
        axes.plot(range(len(scaled)), y, color=OUTCOMES[judged.outcome], alpha=0.6, linewidth=1, zorder=2)
    axes.set_xticks(range(len(scaled)), [name for name, _ in [*columns, *results]], fontsize=8)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for outcome, colour in OUTCOMES.items():
        axes.plot([], [], color=colour, label=outcome)
    figure.legend(loc="outside lower left", ncols=3, frameon=False)
    return figure


def _scale(levels: Iterable[float], even: bool) -> Callable[[float], float]:
    """Places in [0, 1]: levels at even steps, or numbers between the lowest level and the highest."""
    ordered = sorted(set(levels))
    if not even:
        low, high = ordered[0], ordered[-1]
        return lambda value: (min(value, high) - low) / (high - low)
    return lambda value: ordered.index(value) / max(1, len(ordered) - 1)


def _ends(values: Iterable[float]) -> list[float]:
    """0 to 1 for shares; for losses, from 0 to above all that are finite."""
    top = max(1.0, *(math.ceil(value) for value in values if math.isfinite(value)))
    return [0.0, top / 2, top]


def _figure(title: str, width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, x=0.02, ha="left")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes

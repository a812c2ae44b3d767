"""Length against initial states: a factorial of training runs, read from the results of an ordinary sweep.

Every sweep whose space has `initial_state.name` beside `data.train_length` is one. Runs that have not learned
their task are counted and left out of every mean.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.console import RenderableType
from rich.table import Table

from lightning_modules.figures import COLOURS, MARKERS, length_axis, save
from sweeps.reports.results import Measured, Results, describe

STATE, LENGTH = "initial_state.name", "data.train_length"
FACTORS = (1, 16, 64)  # multiples of the training length at which recent needles are shown
RESAMPLES = 2000
CAPTION = (
    "By training length and initial state, every seed a point: recent needles at 64x, the growth of the "
    "head whose state grows most, and what the head that keeps most keeps of the first token."
)

Measure = Callable[[Measured], float | None]
Cells = dict[tuple[str, int, str], list[Measured]]  # other settings, training length, initial state


@dataclass(frozen=True, kw_only=True)
class Factorial:
    """Models by cell, solved and not."""

    cells: Cells

    @classmethod
    def of(cls, results: Results) -> "Factorial | None":
        """None where the sweep is no factorial of lengths and initial states."""
        models = [m for m in results.models if STATE in m.point and LENGTH in m.point]
        cells: Cells = {}
        for model in models:
            other = {key: value for key, value in model.point.items() if key not in (STATE, LENGTH)}
            key = (describe(other), model.point[LENGTH], model.point[STATE])
            cells.setdefault(key, []).append(model)
        several = len({state for _, _, state in cells}) > 1
        return cls(cells=dict(sorted(cells.items(), key=lambda cell: cell[0][:2]))) if several else None

    @property
    def others(self) -> list[str]:
        return list(dict.fromkeys(other for other, _, _ in self.cells))

    @property
    def lengths(self) -> list[int]:
        return sorted({length for _, length, _ in self.cells})

    @property
    def states(self) -> list[str]:
        return list(dict.fromkeys(state for _, _, state in self.cells))

    def values(self, key: tuple[str, int, str], measure: Measure) -> list[float]:
        """Of the cell's solved models."""
        found = [measure(model) for model in self.cells.get(key, []) if model.is_solved]
        return [value for value in found if value is not None]


def recent_at(factor: int) -> Measure:
    def read(model: Measured) -> float | None:
        share = model.recent.get(factor * model.train_length)
        return None if share is None else share.exact

    return read


def metric(name: str) -> Measure:
    return lambda model: model.metrics.get(name)


def render(found: Factorial) -> list[RenderableType]:
    """A row a cell, then what each initial state changes and what length alone does."""
    table = Table(
        title="Length and initial states: means over solved seeds (lowest-highest)", title_justify="left"
    )
    headings = [f"recent {factor}x" for factor in FACTORS]
    for heading in ("", "length", "initial state", "solved", *headings, "RMS", "growth", "retention"):
        table.add_column(heading, justify="left" if heading in ("", "initial state") else "right")
    states = [metric(f"states/{name}_max") for name in ("rms_beyond", "rms_growth", "retention")]
    for key, models in found.cells.items():
        other, length, state = key
        solved = f"{sum(model.is_solved for model in models)}/{len(models)}"
        inside, *beyond = (found.values(key, recent_at(factor)) for factor in FACTORS)
        cells = [_mean(inside), *map(_span, beyond), *(_mean(found.values(key, read)) for read in states)]
        table.add_row(other, f"{length:,}", state, solved, *cells)
        if state == found.states[-1]:
            table.add_section()
    words = (
        "RMS: of the largest head's state beyond training; growth: over its largest within it, of the "
        "head that grows most. retention: of the first token over one length, the head that keeps most."
    )
    return [table, words, *sentences(found)]


def sentences(found: Factorial) -> list[str]:
    """Contrasts in recent exact match at the furthest length, with 95% intervals over resampled seeds."""
    measure, said = recent_at(FACTORS[-1]), []
    at = f"recent exact match at {FACTORS[-1]}x"
    for state in found.states:
        if state == "zero" or "zero" not in found.states:
            continue
        pairs = [((o, n, state), (o, n, "zero")) for o in found.others for n in found.lengths]
        said.append(f"{state} in place of zero: {at} {_contrast(found, pairs, measure)}.")
    for state in found.states:
        low, high = found.lengths[0], found.lengths[-1]
        pairs = [((o, high, state), (o, low, state)) for o in found.others]
        if low != high:
            said.append(
                f"length {high:,} in place of {low:,}, {state}: {at} {_contrast(found, pairs, measure)}."
            )
    return said


def _contrast(
    found: Factorial, pairs: Sequence[tuple[tuple[str, int, str], tuple[str, int, str]]], measure: Measure
) -> str:
    """Mean difference over pairs of cells that both have solved seeds."""
    read = [(found.values(a, measure), found.values(b, measure)) for a, b in pairs]
    both = [(np.array(a), np.array(b)) for a, b in read if a and b]
    if not both:
        return "cannot be compared: no pair of cells has solved seeds"
    generator = np.random.default_rng(0)

    def draw(values: np.ndarray) -> np.ndarray:
        again = generator.choice(values, (RESAMPLES, len(values))).mean(1)
        # n seeds resampled have (n - 1) / n of the variance of new ones
        wider = np.sqrt(len(values) / (len(values) - 1)) if len(values) > 1 else 1.0
        return values.mean() + wider * (again - values.mean())

    difference = np.mean([a.mean() - b.mean() for a, b in both])
    low, high = np.quantile(np.mean([draw(a) - draw(b) for a, b in both], axis=0), [0.025, 0.975])
    alone = min(min(len(a), len(b)) for a, b in both) < 2
    interval = "no interval: one seed in a cell" if alone else f"[{low:+.2f}, {high:+.2f}]"
    return f"{difference:+.2f} {interval}, {len(both)} of {len(pairs)} pairs of cells"


def write_figure(found: Factorial, folder: Path) -> Path:
    """Recent accuracy, state growth and retention by training length; a column for each other setting."""
    measures = [
        (f"recent exact match\nat {FACTORS[-1]}x", recent_at(FACTORS[-1])),
        ("RMS growth beyond\ntraining, largest head", metric("states/rms_growth_max")),
        ("retention over one\nlength, largest head", metric("states/retention_max")),
    ]
    measures = [
        (name, read) for name, read in measures if any(found.values(key, read) for key in found.cells)
    ]
    figure = Figure(
        figsize=(2.2 + 3.6 * len(found.others), 1.2 + 2.3 * max(1, len(measures))), layout="constrained"
    )
    FigureCanvasAgg(figure)
    figure.suptitle("Training length and initial states", fontsize=12, x=0.02, ha="left")
    panels = figure.subplots(
        max(1, len(measures)), len(found.others), squeeze=False, sharex=True, sharey="row"
    )
    for row, (name, read) in enumerate(measures):
        for column, other in enumerate(found.others):
            axes = panels[row][column]
            axes.spines[["top", "right"]].set_visible(False)
            for i, state in enumerate(found.states):
                by_length = {n: found.values((other, n, state), read) for n in found.lengths}
                x = [n * 1.02 ** (i - len(found.states) / 2) for n in by_length for _ in by_length[n]]
                y = [value for values in by_length.values() for value in values]
                axes.plot(x, y, MARKERS[i], color=COLOURS[i], markersize=4, alpha=0.7)
                means = [(n, np.mean(values)) for n, values in by_length.items() if values]
                if means:
                    axes.plot(*zip(*means, strict=True), color=COLOURS[i], linewidth=1.6)
            length_axis(axes, found.lengths, "training length (tokens)" if row == len(measures) - 1 else "")
            if row == 0:
                axes.set_title(other or "all", fontsize=10, loc="left")
            if name.startswith("RMS"):
                axes.set_yscale("log")
                for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                    axis_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            else:
                axes.set_ylim(-0.03, 1.03)
            if column == 0:
                axes.set_ylabel(name)
    for i, state in enumerate(found.states):
        panels[0][0].plot([], [], color=COLOURS[i], marker=MARKERS[i], label=state)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower left", ncols=5, frameon=False)
    return save(figure, folder / "initial_states.png")


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f}" if values else ""


def _span(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, low, high = (f"{value:.2f}" for value in (np.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}-{high})"

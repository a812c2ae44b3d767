"""Figures of evaluations, from plain rows. No global state: safe in any process, with or without display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import NDArray

# Okabe and Ito's palette, told apart with every kind of colour vision; black is kept for annotations.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#555555"
DPI = 150

Rows = Sequence[Mapping[str, Any]]


def accuracy_by_length(
    series: Mapping[str, Rows],
    train_length: int | None,
    *,
    title: str = "Passkey exact match by prompt length",
    measure: str = "exact",
    name: str = "exact match",
) -> Figure:
    """Accuracy over prompt length, one line a label, intervals as bands.

    Args:
        series: label -> rows with "length", the `measure` and, for a band, its "_low" and "_high". Of the
            first label's rows "chance", where they have one, is dotted.
        train_length: marked by a vertical line; None when the lines differ in it.
        name: of the measure, for the axis.
    """
    figure, axes = new_figure(title)
    lengths = sorted({row["length"] for rows in series.values() for row in rows})
    banded = False
    for i, (label, rows) in enumerate(series.items()):
        rows = sorted(rows, key=lambda row: row["length"])
        x = [row["length"] for row in rows]
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        y = [row[measure] for row in rows]
        axes.plot(x, y, label=label, color=colour, marker=marker, markersize=5, linewidth=1.8, zorder=3)
        if i == 0 and all("chance" in row for row in rows):
            chance = [row["chance"] for row in rows]
            axes.plot(x, chance, ":", color=GREY, linewidth=1.4, label="chance", zorder=2)
        if all(f"{measure}_low" in row for row in rows):
            low, high = ([row[f"{measure}_{side}"] for row in rows] for side in ("low", "high"))
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            banded = True
    length_axis(axes, lengths[:: -(-len(lengths) // 12)], "prompt length (tokens)")
    mark_train_length(axes, train_length)
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel(name)
    add_legend(figure, "bands: Wilson 95% intervals" if banded else None)
    return figure


def passkey_heatmap(
    cells: Rows,
    train_length: int,
    *,
    title: str = "Passkey exact match by depth of the needle",
    measure: str = "exact",
    name: str = "exact match",
) -> Figure:
    """Accuracy over depth (rows) and prompt length (columns); the training length is marked on its column.

    cells: rows with "length", "depth" in (0, 1) and the `measure`, whose name stands at the colour bar.
    """
    lengths, depths = (sorted({cell[name] for cell in cells}) for name in ("length", "depth"))
    grid = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
        grid[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell[measure]

    figure, axes = new_figure(
        title, width=2.6 + 0.85 * max(4, len(lengths)), height=1.8 + 0.36 * max(5, len(depths))
    )
    image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    if grid.size <= 400:
        for (row, column), exact in np.ndenumerate(grid):
            if np.isfinite(exact):
                colour = "black" if exact > 0.55 else "white"
                axes.text(column, row, f"{exact:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(lengths)), [short_number(n) for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}%" for depth in depths])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    # A column is trained up to the edge behind the last length that training reached.
    edge = sum(length <= train_length for length in lengths) - 0.5
    axes.axvline(edge, color=COLOURS[1], linewidth=2)
    axes.annotate(
        f"trained to {short_number(train_length)}",
        (edge, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center" if edge > 0 else "left",
        color=COLOURS[1],
        fontsize=9,
    )
    axes.set_xlabel("prompt length (tokens)")
    axes.set_ylabel("needle depth (0% = start of prompt)")
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(name)
    bar.outline.set_visible(False)
    return figure


def loss_by_position(
    series: Mapping[str, Mapping[str, Sequence[Any]]], train_length: int, *, title: str = "Loss by position"
) -> Figure:
    """Loss over position, one colour a label: pale as measured, bold its mean over stretches of one training
    length, longer ones far out where the axis crowds them. Gaps where it was not finite.

    series: label -> {"position": [...], "loss": [...]}.
    """
    figure, axes = new_figure(title)
    for i, (label, curve) in enumerate(series.items()):
        position = np.array(curve["position"])
        loss = np.array([np.nan if value is None else value for value in curve["loss"]])
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(position, loss, color=colour, alpha=0.35, linewidth=1)
        middles, means = stretch_means(position, loss, train_length)
        axes.plot(middles, means, label=label, color=colour, linewidth=2, marker=".", zorder=3)
    positions = [p for curve in series.values() for p in curve["position"]]
    length_axis(axes, powers_of_two(min(positions), max(positions)), "position (tokens)")
    mark_train_length(axes, train_length)
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(bottom=0)
    words = f"pale: as measured; bold: mean over stretches of {short_number(train_length)} tokens or more"
    add_legend(figure, words)
    return figure


def stretch_means(
    position: NDArray[np.float64], loss: NDArray[np.float64], train_length: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean positions and losses of stretches of one training length, longer ones far out."""
    _, stretch = np.unique(_stretches(position, train_length), return_inverse=True)
    count = np.bincount(stretch)
    return np.bincount(stretch, position) / count, np.bincount(stretch, loss) / count


def add_legend(figure: Figure, caption: str | None = None) -> None:
    """Name the lines and points of the figure's only axes, with a caption, below: there it covers no data.

    It has as many columns as the figure has room for; the figure grows by its height.
    """
    handles, labels = figure.axes[0].get_legend_handles_labels()
    style: dict[str, Any] = {"loc": "outside lower left", "alignment": "left", "frameon": False}
    for columns in range(len(labels), 0, -1):
        legend = figure.legend(handles, labels, ncols=columns, title=caption, title_fontsize=8, **style)
        box = legend.get_window_extent()
        if box.width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    legend.get_title().set_color(GREY)
    figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path


def short_number(n: float) -> str:
    """256, 1K, 16K, 1M: powers of two in binary thousands, anything else rounded."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if n >= unit:
            return f"{n / unit:.3g}{name}"
    return f"{n:g}"


def new_figure(title: str, width: float = 7.0, height: float = 4.2) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes, titled on the left."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    figure.suptitle(title, fontsize=12, x=0.02, ha="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def length_axis(axes: Axes, ticks: Sequence[float], label: str) -> None:
    """A log axis with its labels at the measured lengths."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: short_number(n)))
    axes.set_xlabel(label)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def mark_train_length(axes: Axes, train_length: int | None) -> None:
    """A dashed line at the training length, if there is one."""
    if train_length is None:
        return
    axes.axvline(train_length, color=GREY, linestyle="--", linewidth=1.2, zorder=2)
    axes.annotate(
        f"training length {short_number(train_length)}",
        (train_length, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, 3),
        textcoords="offset points",
        color=GREY,
        fontsize=9,
    )


def _stretches(position: NDArray[np.float64], train_length: int) -> NDArray[np.int64]:
    """The stretch that each position lies in: whole training lengths, about a sixth of the way so far."""
    ends = [train_length]
    while ends[-1] < position[-1]:
        ends.append(ends[-1] + train_length * max(1, ends[-1] // (6 * train_length)))
    return np.searchsorted(ends, position)


def powers_of_two(low: float, high: float) -> list[float]:
    """At most a dozen ticks from `low` to `high`."""
    first, last = int(np.floor(np.log2(low))), int(np.ceil(np.log2(high)))
    step = max(1, -(-(last - first) // 11))
    return [2.0**i for i in range(first, last + 1, step)]

"""Figures of a diagnosis, from diagnosis.json and the measures beside it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_modules.diagnosis.reading import Measures
from lightning_modules.figures import (
    COLOURS,
    GREY,
    accuracy_by_length,
    length_axis,
    loss_by_position,
    mark_train_length,
    new_figure,
    powers_of_two,
    short_number,
)

HIGHLIGHTED = 5  # heads drawn in colour and named
BINS = 40

Head = tuple[int, int]


def draw_figures(diagnosis: dict[str, Any], measures: Measures) -> Iterator[tuple[str, Figure]]:
    """(file name, figure), what matters most first."""
    heads, train_length, values = highlighted(diagnosis), measures.train_length, measures.values
    thresholds = diagnosis["thresholds"]
    evidence = [("loss_by_position.png", _loss(diagnosis))]
    if diagnosis["needles"] is not None:
        evidence.insert(0, ("needles.png", _needles(diagnosis)))
    yield evidence.pop(0)
    peak = np.max(values["variance"][measures.inside], 0)
    growth = values["variance"] / np.where(peak > 0, peak, np.nan)
    figure, axes = by_head(
        "State variance over its maximum within the training length", measures, growth, heads
    )
    axes.set_ylabel("variance / maximum inside")
    _limit(axes, thresholds["variance_ratio"], f"collapsed head: {thresholds['variance_ratio']:g}x")
    yield "variance.png", figure
    keeping = sorted(diagnosis["heads"], key=lambda row: -row["retention"])[:HIGHLIGHTED]
    longest = [(row["layer"], row["head"]) for row in keeping]
    figure, axes = by_head("Retention of the first token", measures, np.exp(values["log_retention"]), longest)
    axes.set(ylabel="share left of the first token", yscale="linear", ylim=(-0.03, 1.03))
    _limit(axes, thresholds["retention"], f"over-retaining: {thresholds['retention']:g}")
    yield "retention.png", figure
    yield from evidence
    figure, axes = by_head("Root mean square of the state", measures, values["rms"], heads)
    axes.set_ylabel("RMS of the state")
    yield "rms.png", figure
    yield "half_lives.png", half_lives(diagnosis["heads"], train_length, diagnosis["length"])
    yield "variance_by_layer_and_head.png", _heatmap(diagnosis["heads"])
    yield "updates.png", _updates(measures, heads)
    yield "channels.png", _channels(measures, heads[0])
    if diagnosis["remembrance"] is not None:
        yield "remembrance.png", _remembrance(diagnosis["remembrance"])


def highlighted(diagnosis: dict[str, Any]) -> list[Head]:
    """The heads worth naming: collapsed ones, then over-retaining ones, then those that grow most."""
    growing = sorted(diagnosis["heads"], key=lambda row: -(row["variance_ratio"] or 0.0))
    rows = [*diagnosis["collapsed_heads"], *diagnosis["over_retaining_heads"], *growing[:3]]
    return list(dict.fromkeys((row["layer"], row["head"]) for row in rows))[:HIGHLIGHTED]


def by_head(
    title: str, measures: Measures, values: NDArray[np.float64], heads: list[Head]
) -> tuple[Figure, Axes]:
    """values (n, layers, heads) over position on log axes: every head grey, some in colour."""
    figure, axes = new_figure(title)
    positions = measures.positions
    lines = values.reshape(len(positions), -1).T
    curves = [np.column_stack([positions, line]) for line in lines]
    axes.add_collection(LineCollection(curves, colors="#BBBBBB", linewidths=0.8, alpha=0.6))
    for i, (layer, head) in enumerate(heads):
        label = f"layer {layer} head {head}"
        axes.plot(positions, values[:, layer, head], color=COLOURS[i], linewidth=1.8, label=label, zorder=3)
    axes.set_yscale("log")
    axes.autoscale_view()
    _positions_axis(axes, positions[0], positions[-1])
    mark_train_length(axes, measures.train_length)
    axes.legend(loc="best", frameon=False, fontsize=8)
    return figure, axes


def half_lives(rows: list[dict[str, Any]], train_length: int, length: int) -> Figure:
    """Every head's half-life by layer; those longer than the prompt are extrapolated and drawn hollow."""
    layers = max(row["layer"] for row in rows) + 1
    figure, axes = new_figure("Half-life of a token in each head", width=max(7.0, 1.5 + 0.2 * layers))
    heads = max(row["head"] for row in rows) + 1
    known = [row for row in rows if row["half_life"] is not None]
    for hollow in (False, True):
        some = [row for row in known if row["half_life_extrapolated"] == hollow]
        x = [row["layer"] + 0.6 * ((row["head"] + 0.5) / heads - 0.5) for row in some]
        label = "longer than the prompt, extrapolated" if hollow else "within the prompt"
        face = "none" if hollow else COLOURS[0]
        y = [max(row["half_life"], 1e-3) for row in some]
        axes.scatter(x, y, s=18, facecolors=face, edgecolors=COLOURS[0], label=label, zorder=3)
    axes.set_yscale("log")
    for at, name in ((train_length, "training length"), (length, "prompt")):
        axes.axhline(at, color=GREY, linestyle="--", linewidth=1)
        axes.annotate(
            f"{name} {short_number(at)}",
            (1, at),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            color=GREY,
            fontsize=8,
        )
    axes.set_xlabel("layer")
    axes.set_ylabel("half-life (tokens)")
    axes.set_xlim(-0.6, layers - 0.4)
    axes.set_xticks(_counted(layers))
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.legend(loc="best", frameon=False, fontsize=8)
    return figure


def _needles(diagnosis: dict[str, Any]) -> Figure:
    needles, collapse = diagnosis["needles"], diagnosis["collapse"]
    train_length = diagnosis["train_length"]
    series = {f"needle within the last {train_length:,} tokens": needles["recent"]}
    if needles["anywhere"]:
        series["needle anywhere"] = needles["anywhere"]
    figure = accuracy_by_length(series, train_length, title="Passkey exact match by prompt length")
    length_axis(figure.axes[0], _doublings(train_length, diagnosis["length"]), "prompt length (tokens)")
    if collapse["position"] is not None:
        _collapse_line(figure.axes[0], collapse["position"])
    return figure


def _loss(diagnosis: dict[str, Any]) -> Figure:
    loss, collapse = diagnosis["loss"], diagnosis["collapse"]
    series = {diagnosis["prompt"]["text"]: loss}
    figure = loss_by_position(series, diagnosis["train_length"], title="Loss by position on the prompt")
    if collapse["by"] == "loss":
        axes = figure.axes[0]
        if collapse["limit"] is not None:
            axes.set_ylim(top=max(axes.get_ylim()[1], 1.1 * collapse["limit"]))
            _limit(axes, collapse["limit"], f"limit {collapse['limit']:.3g}")
        if collapse["position"] is not None:
            _collapse_line(axes, collapse["position"])
    return figure


def _heatmap(rows: list[dict[str, Any]]) -> Figure:
    layers, heads = (max(row[name] for row in rows) + 1 for name in ("layer", "head"))
    grid = np.full((layers, heads), np.nan)
    for row in rows:
        grid[row["layer"], row["head"]] = row["variance_ratio"] if row["variance_ratio"] else np.nan
    figure, axes = new_figure(
        "Growth of the state variance by layer and head",
        width=max(7.0, 2.5 + 0.16 * heads),
        height=2.6 + 0.18 * layers,
    )
    image = axes.imshow(np.log2(grid), cmap="cividis", aspect="auto")
    if grid.size <= 64:
        middle = np.nanmean(image.get_clim())
        for (layer, head), value in np.ndenumerate(grid):
            colour = "black" if np.log2(value) > middle else "white"
            axes.text(head, layer, f"{value:.3g}x", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_xticks(_counted(heads))
    axes.set_yticks(_counted(layers))
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("doublings")
    return figure


def _updates(measures: Measures, heads: list[Head]) -> Figure:
    figure, first = new_figure("What the tokens do to the state, means between samples", height=6.5)
    first.remove()
    forgotten = -np.expm1(measures.values["log_decay"])
    panels = [("dt", measures.values["dt"]), ("1 - retention of a token", forgotten)]
    panels.append(("norm of an insertion", measures.values["insertion"]))
    for row, (label, values) in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, row + 1)
        axes.spines[["top", "right"]].set_visible(False)
        for i, (layer, head) in enumerate(heads):
            line = values[:, layer, head]
            axes.plot(
                measures.positions, line, color=COLOURS[i], linewidth=1.4, label=f"layer {layer} head {head}"
            )
        axes.set_yscale("log")
        axes.set_ylabel(label)
        _positions_axis(axes, measures.positions[0], measures.positions[-1])
        axes.set_xlabel("position (tokens)" if row == len(panels) - 1 else "")
        axes.axvline(measures.train_length, color=GREY, linestyle="--", linewidth=1.2)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8
    )
    return figure


def _channels(measures: Measures, head: Head) -> Figure:
    layer, index = head
    figure, axes = new_figure(f"Channels of layer {layer} head {index}, deviation from the head's mean")
    pairs = [("at the training length", measures.channels_inside), ("at the end", measures.channels_end)]
    deviations = [np.sqrt(channels[layer][index]).ravel() for _, channels in pairs]
    edges = np.linspace(0, max(float(d.max()) for d in deviations) or 1.0, BINS + 1).tolist()
    for i, (label, deviation) in enumerate(zip((name for name, _ in pairs), deviations, strict=True)):
        axes.hist(deviation, edges, color=COLOURS[i], alpha=0.55, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("root mean square deviation of a channel")
    axes.set_ylabel("channels")
    axes.legend(loc="best", frameon=False, fontsize=8)
    return figure


def _remembrance(found: dict[str, Any]) -> Figure:
    figure, axes = new_figure(f"Effective remembrance at {found['length']:,} tokens")
    axes.plot(found["start"], found["distance"], color=COLOURS[0], marker="o", markersize=4)
    _positions_axis(axes, 1, found["length"])
    axes.set_xlabel("first tokens left out")
    axes.set_ylabel("total variation distance")
    axes.set_ylim(-0.03, 1.03)
    return figure


def _doublings(low: int, high: int) -> list[int]:
    count = int(np.log2(high / low)) + 1
    return [low << i for i in range(0, count, -(-count // 12))]


def _counted(n: int) -> list[int]:
    """Ticks for 0 .. n - 1, at most 16 of them."""
    return list(range(0, n, -(-n // 16)))


def _positions_axis(axes: Axes, low: float, high: float) -> None:
    length_axis(axes, powers_of_two(low, high), "position (tokens)")
    axes.set_xlim(low / 1.05, high * 1.05)


def _limit(axes: Axes, value: float, label: str) -> None:
    axes.axhline(value, color=COLOURS[1], linestyle=":", linewidth=1.2, zorder=2)
    axes.annotate(
        label,
        (0, value),
        xycoords=("axes fraction", "data"),
        xytext=(4, 3),
        textcoords="offset points",
        color=COLOURS[1],
        fontsize=8,
    )


def _collapse_line(axes: Axes, position: int) -> None:
    axes.axvline(position, color=COLOURS[1], linewidth=1.6, zorder=2)
    axes.annotate(
        f"collapse {short_number(position)}",
        (position, 0.93),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        color=COLOURS[1],
        fontsize=9,
    )

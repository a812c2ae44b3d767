"""A comparison of mitigations for eyes: tables and a figure, from bench.json alone."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from lightning_modules.evaluation.report import describe_mitigation
from lightning_modules.figures import (
    COLOURS,
    MARKERS,
    length_axis,
    mark_train_length,
    powers_of_two,
    short_number,
    stretch_means,
)

Row = dict[str, Any]
# What the first table shows: heading, metric, format; changes are from the baseline.
COLUMNS = (
    ("loss in length", "loss/in_length", ".3f"),
    ("change", "change/loss_in_length", "+.3f"),
    ("loss beyond, at most", "loss/max_beyond", ".3f"),
    ("tokens/s", "speed/tokens_per_second", ",.0f"),
    ("peak MiB", "memory/peak_mib", ",.0f"),
    ("state MiB a sequence", "memory/state_mib_per_sequence", ".3g"),
)
CHANGES = ("loss/in_length", "passkey/recall_exact_in_length", "passkey/recent_exact_in_length")


def compare(measured: list[tuple[dict[str, Any], dict[str, float]]]) -> list[Row]:
    """Rows of bench.json from (evaluation.json, metrics), the baseline first: with every change from it."""
    baseline = measured[0][1]
    rows = []
    for evaluation, metrics in measured:
        both = [name for name in CHANGES if name in metrics and name in baseline]
        changes = {f"change/{_plain(name)}": metrics[name] - baseline[name] for name in both}
        kept = {name: evaluation[name] for name in ("mitigation", "passkey", "loss", "tasks", "conclusion")}
        label = describe_mitigation(evaluation["mitigation"]) or "none"
        rows.append({"label": label, "metrics": metrics | changes, **kept})
    return rows


def columns(report: dict[str, Any]) -> dict[str, list[Any]]:
    """The first table, and accuracy at every length, as columns of numbers."""
    names = dict.fromkeys(name for row in report["rows"] for name in row["metrics"])
    table: dict[str, list[Any]] = {"mitigation": [row["label"] for row in report["rows"]]}
    return table | {name: [row["metrics"].get(name) for row in report["rows"]] for name in names}


def tables(report: dict[str, Any]) -> list[Table]:
    """What each mitigation costs and gives; then recent needles, needles at any depth, every task, apart."""
    rows, shown = report["rows"], []
    found = [c for c in COLUMNS if any(c[1] in row["metrics"] for row in rows)]
    table = _table(f"What each costs, trained at {short_number(report['train_length'])} tokens")
    for heading, _, _ in found:
        table.add_column(heading, justify="right")
    for row in rows:
        numbers = [row["metrics"].get(name) for _, name, _ in found]
        cells = ["-" if n is None else f"{n:{c[2]}}" for n, c in zip(numbers, found, strict=True)]
        table.add_row(row["label"], *cells)
    shown.append(table)
    for title, key in (
        ("Recent needles: exact match by prompt length", "recent"),
        ("Needles at any depth: exact match by prompt length", "recall_by_length"),
        *((f"{name}: answers right by prompt length", name) for name in rows[0]["tasks"]),
    ):
        curves = {row["label"]: _accuracy(row, key) for row in rows}
        lengths = sorted({length for curve in curves.values() for length in curve})
        if not lengths:
            continue
        table = _table(title)
        for length in lengths:
            table.add_column(short_number(length), justify="right")
        for label, curve in curves.items():
            table.add_row(label, *(f"{curve[n]:.2f}" if n in curve else "" for n in lengths))
        shown.append(table)
    return shown


def _table(title: str) -> Table:
    """With a first column of labels."""
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    return table


def draw(report: dict[str, Any]) -> Figure:
    """Loss by position, recent needles, needles at any depth, tasks: a panel each; a line a mitigation."""
    rows, train_length = report["rows"], report["train_length"]
    panels = [
        (title, key)
        for title, key in (
            ("loss (nats per token)", "loss"),
            ("exact match, recent needles", "recent"),
            ("exact match, needles at any depth", "recall_by_length"),
            *((f"answers right, {name}", name) for name in rows[0]["tasks"]),
        )
        if any(_curve(row, key, train_length)[0] for row in rows)
    ]
    figure = Figure(figsize=(0.6 + 4.6 * len(panels), 4.4 + 0.2 * (len(rows) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"Mitigations of {report['checkpoint']}", fontsize=12, x=0.02, ha="left")
    for place, (title, key) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        axes.spines[["top", "right"]].set_visible(False)
        positions = [_draw_curve(axes, i, row, key, train_length) for i, row in enumerate(rows)]
        flat = [p for some in positions for p in some]
        name = "position (tokens)" if key == "loss" else "prompt length (tokens)"
        length_axis(axes, powers_of_two(min(flat), max(flat)), name)
        mark_train_length(axes, train_length)
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0) if key == "loss" else axes.set_ylim(-0.03, 1.03)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    return figure


def _draw_curve(axes: Axes, i: int, row: Row, key: str, train_length: int) -> list[float]:
    x, y = _curve(row, key, train_length)
    colour = "black" if i == 0 else COLOURS[(i - 1) % len(COLOURS)]
    style = "--" if i == 0 else ("-", ":", "-.")[(i - 1) // len(COLOURS) % 3]
    marker = "" if key == "loss" else MARKERS[i % len(MARKERS)]
    axes.plot(x, y, style, label=row["label"], color=colour, marker=marker, markersize=4, linewidth=1.6)
    return x


def _curve(row: Row, key: str, train_length: int) -> tuple[list[float], list[float]]:
    if key != "loss":
        accuracy = _accuracy(row, key)
        return [float(length) for length in accuracy], list(accuracy.values())
    if row["loss"] is None:
        return [], []
    loss = np.array([np.nan if value is None else value for value in row["loss"]["loss"]])
    x, y = stretch_means(np.array(row["loss"]["position"]), loss, train_length)
    return x.tolist(), y.tolist()


def _accuracy(row: Row, key: str) -> dict[int, float]:
    if key in row["tasks"]:
        return {one["length"]: one["accuracy"] for one in row["tasks"][key]["by_length"]}
    return {} if row["passkey"] is None else {one["length"]: one["exact"] for one in row["passkey"][key]}


def _plain(metric: str) -> str:
    return metric.replace("loss/", "loss_").replace("passkey/", "")

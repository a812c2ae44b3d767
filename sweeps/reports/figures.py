"""The figures of a sweep, as PNG files in its study directory."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_modules.figures import COLOURS, GREY, MARKERS, Rows, accuracy_by_length, add_legend, save
from sweeps.reports.results import Measured, Mended, Results, Share, describe, mitigation

RECENT = "Needles within the last training length: exact match"
RECALL = "Needles at all depths: exact match"


def write_figures(results: Results, folder: Path) -> list[Path]:
    """Draw what there is to draw; returns the files in reading order."""
    written = []
    models = [model for model in results.models if model.recent]
    if models:
        written.append(
            _by_length(models, lambda m: m.recent, _model_label, RECENT, folder / "recent_by_length.png")
        )
    if any(model.recall for model in models):
        written.append(
            _by_length(models, lambda m: m.recall, _model_label, RECALL, folder / "recall_by_length.png")
        )
    for mended in results.mended:
        written += _write_mended(mended, results, folder)
    return written


def _write_mended(mended: Mended, results: Results, folder: Path) -> list[Path]:
    stem, of = f"mitigation-{mended.model.number:04d}", f"\n{mended.model.label}"
    length = mended.model.train_length
    written = []
    for name, title, shares in (("recent", RECENT, _recent), ("recall", RECALL, _recall)):
        if any(shares(measured) for measured in mended.compared):
            path = folder / f"{stem}-{name}.png"
            written.append(_by_length(mended.compared, shares, _label, title + of, path, length))
    if any(measured.in_length is not None for measured in mended.tried):
        path = folder / f"{stem}-settings.png"
        written.append(save(_cost_and_gain(mended, results.config.mitigation.metric, of), path))
    for name in dict.fromkeys(map(mitigation, mended.tried)):
        figure = _settings_grid(mended, name, results.config.mitigation.metric, of)
        if figure:
            written.append(save(figure, folder / f"{stem}-{name}.png"))
    return written


def _by_length(
    measured: Sequence[Measured],
    shares: Callable[[Measured], dict[int, Share]],
    label: Callable[[Measured], str],
    title: str,
    path: Path,
    train_length: int | None = None,
) -> Path:
    """One line per point, with its interval; the mean without one where several seeds share the point."""
    groups: dict[str, list[dict[int, Share]]] = {}
    for one in measured:
        groups.setdefault(label(one), []).append(shares(one))
    series = {}
    for name, group in groups.items():
        several = f" (mean of {len(group)} seeds)" if len(group) > 1 else ""
        series[name + several] = _mean_rows(group) if several else _rows(group[0])
    return save(accuracy_by_length(series, train_length, title=title), path)


def _rows(shares: dict[int, Share]) -> Rows:
    return [
        {"length": length, "exact": share.exact, "exact_low": share.low, "exact_high": share.high}
        for length, share in shares.items()
    ]


def _mean_rows(group: list[dict[int, Share]]) -> Rows:
    lengths = sorted(set.intersection(*map(set, group)))
    return [{"length": n, "exact": float(np.mean([shares[n].exact for shares in group]))} for n in lengths]


def _recent(measured: Measured) -> dict[int, Share]:
    return measured.recent


def _recall(measured: Measured) -> dict[int, Share]:
    return measured.recall


def _label(measured: Measured) -> str:
    return measured.label


def _model_label(model: Measured) -> str:
    return describe(model.point) + ("" if model.is_solved else " (unsolved)")


def _cost_and_gain(mended: Mended, metric: str, of: str) -> Figure:
    """Every setting tried: what it does beyond the training length against what it does within."""
    figure = _new_figure(f"Mitigation settings: beyond the training length against within it{of}", 7.0, 4.2)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    for i, name in enumerate(dict.fromkeys(map(mitigation, mended.tried))):
        points = [m for m in mended.tried if mitigation(m) == name and m.in_length is not None]
        x, y = [m.in_length or 0.0 for m in points], [m.value for m in points]
        baseline = name == "none"
        marker = (
            {"color": "black", "marker": "*", "s": 160}
            if baseline
            else {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        )
        axes.scatter(x, y, label=name, zorder=4 if baseline else 3, **marker)
        if baseline and points:
            axes.axvline(x[0], color=GREY, linestyle="--", linewidth=1)
            axes.axhline(y[0], color=GREY, linestyle="--", linewidth=1)
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel("exact match at the training length")
    axes.set_ylabel(metric)
    add_legend(figure)
    return figure


def _settings_grid(mended: Mended, name: str, metric: str, of: str) -> Figure | None:
    """A heatmap of a mitigation with two settings of several values each; None for anything else."""
    tried = [m for m in mended.tried if mitigation(m) == name]
    keys = [key for key in tried[0].point if key != "mitigation.name"]
    if len(keys) != 2:
        return None
    rows, columns = ([*dict.fromkeys(m.point[key] for m in tried)] for key in keys)
    rows, columns = sorted(rows, reverse=True), sorted(columns, reverse=True)
    if len(rows) < 2 or len(columns) < 2 or len(rows) * len(columns) > 4 * len(tried):
        return None
    figure = _new_figure(f"{name}{of}", 2.4 + 2.0 * len(columns), 1.9 + 0.5 * len(rows))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title, value in (
        (panels[0], metric, lambda m: m.value),
        (panels[1], "exact match at the training length", lambda m: m.in_length),
    ):
        cells = np.full((len(rows), len(columns)), np.nan)
        for measured in [*tried, *(m for m in mended.tried if mitigation(m) == "none")]:
            # The baseline is the cell where both factors are 1.
            place = [measured.point.get(key, 1.0) for key in keys]
            seen = value(measured)
            if seen is not None and place[0] in rows and place[1] in columns:
                cells[rows.index(place[0]), columns.index(place[1])] = seen
        share = np.nanmin(cells) >= 0 and np.nanmax(cells) <= 1
        axes.imshow(
            cells, cmap="cividis", vmin=0 if share else None, vmax=1 if share else None, aspect="auto"
        )
        for (row, column), cell in np.ndenumerate(cells):
            if np.isfinite(cell):
                colour = "black" if cell > 0.55 else "white"
                axes.text(column, row, f"{cell:.2f}", ha="center", va="center", fontsize=9, color=colour)
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
        axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
        axes.set_xlabel(keys[1].rsplit(".", 1)[-1])
        axes.tick_params(length=0)
    panels[0].set_ylabel(keys[0].rsplit(".", 1)[-1])
    return figure


def _new_figure(title: str, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, x=0.02, ha="left")
    return figure

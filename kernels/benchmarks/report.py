"""Numbers of the suite `ops` as lines, a table, JSON and a figure."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kernels.benchmarks.costs import Machine

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]


def write(path: Path, config: dict[str, Any], machine: Machine, rows: Sequence[Row]) -> None:
    """The whole record, after every operator, so that a run that ends early leaves what it had."""
    record = {
        "config": config,
        "torch": torch.__version__,
        "machine": asdict(machine),
        "rows": list(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(record, indent=1))
    partial.replace(path)


def line(row: Row) -> str:
    """One row in one line."""
    what = f"{row['op']:<19} {_where(row):<34} {_who(row):<20}"
    if row["ms"] is None:
        return f"{what} failed: {row['error']}"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:6.2f}x"
    return f"{what} {row['ms']:9.4f} ms {row['share_of_limit']:5.0%} of the limit {ratio}"


def table(rows: Sequence[Row]) -> "Table":
    from rich.table import Table

    shown = Table(title="operators: medians; ratio = time over ours", show_lines=False)
    for name in ("op", "shape", "who"):
        shown.add_column(name, no_wrap=True)
    names = (
        "ms",
        "±",
        "host",
        "ratio",
        "GB/s",
        "TFLOP/s",
        "of limit",
        "temp MiB",
        "launches",
        "first s",
        "error",
    )
    for name in names:
        shown.add_column(name, justify="right")
    previous = None
    for row in rows:
        if previous not in (None, row["op"]):
            shown.add_section()
        previous = row["op"]
        what = (row["op"], _where(row), _who(row))
        if row["ms"] is None:
            shown.add_row(*what, "failed", *[""] * (len(names) - 2), row["error"][:60])
            continue
        cells = [
            f"{row['ms']:.4f}",
            f"{row['spread_ms']:.4f}",
            f"{row['host_ms']:.3f}",
            _number(row["ratio"], ".2f"),
        ]
        cells += [f"{row['gb_per_s']:.0f}", f"{row['tflop_per_s']:.0f}", f"{row['share_of_limit']:.0%}"]
        cells += [
            f"{row['temporaries_mib']:.0f}",
            _number(row["launches"], "d"),
            f"{row['first_call_s']:.2f}",
        ]
        shown.add_row(*what, *cells, _number(row["oracle_error"], ".0e"))
    return shown


def figure(rows: Sequence[Row], path: Path) -> Path:
    """Bars of each system by shape, a panel an operator, the limit as a black line across each group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ops = list(dict.fromkeys(row["op"] for row in rows))
    systems = list(dict.fromkeys(row["system"] for row in rows))
    across = min(2, len(ops)) or 1
    down = max(1, -(-len(ops) // across))
    drawing, panels = plt.subplots(down, across, figsize=(8 * across, 3.6 * down), squeeze=False)
    for panel, op in zip(panels.flat, ops, strict=False):
        mine = [row for row in rows if row["op"] == op]
        places = list(dict.fromkeys(_where(row) for row in mine))
        present = [system for system in systems if any(row["system"] == system for row in mine)]
        width = 0.8 / len(present)
        for index, system in enumerate(present):
            bars = [(places.index(_where(r)), r["ms"]) for r in mine if r["system"] == system and r["ms"]]
            if bars:
                at, heights = zip(*bars, strict=True)
                panel.bar(
                    [x + (index + 0.5) * width - 0.4 for x in at],
                    heights,
                    width,
                    label=system,
                    color=f"C{systems.index(system)}",
                )
        limits = {places.index(_where(row)): row["limit_ms"] for row in mine}
        panel.hlines(
            list(limits.values()),
            [x - 0.45 for x in limits],
            [x + 0.45 for x in limits],
            color="black",
            label="limit",
        )
        panel.set(title=op, yscale="log", ylabel="ms")
        panel.set_xticks(range(len(places)), places, rotation=30, ha="right", fontsize=7)
        panel.legend(fontsize=7)
    for panel in panels.flat[len(ops) :]:
        panel.set_visible(False)
    drawing.tight_layout()
    drawing.savefig(path, dpi=110)
    plt.close(drawing)
    return path


def _where(row: Row) -> str:
    return row["shape"] + (" sliced" if row["layout"] == "sliced" else "")


def _who(row: Row) -> str:
    return f"{row['system']} {row['variant']}".strip()


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)

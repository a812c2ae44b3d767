"""The suite `ops`: every operator on a GPU, ours and peers on the same inputs in one process.

    python -m kernels.bench suite=ops [ops=[scan,conv]] [shapes=[B8 T4096]] [peers=[mamba_ssm]] [json=PATH]

Each is first compared with the oracle on a few tokens, then timed: medians by CUDA events, inputs out of the
L2 cache, `step` inside a CUDA graph. The limit is the larger of compulsory bytes over the speed of a copy and
matrix-product FLOPs over that of a large product, both measured first. A failure is a row that says why.
"""

import gc
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from conf.load import die, user_errors
from conf.schema import option, require
from kernels.benchmarks import check, rivals, timing
from kernels.benchmarks.costs import Machine
from kernels.benchmarks.inputs import Inputs, cotangent, size
from kernels.benchmarks.ops import OPS, Op
from kernels.benchmarks.rivals import PEERS, Contender
from kernels.benchmarks.shapes import LAYOUTS, Shape
from kernels.benchmarks.suite import chosen

# The error that a broken launch leaves behind on the device: nothing more can be measured in this process.
FATAL = ("illegal memory access", "unspecified launch failure", "misaligned address", "device-side assert")
WIDTH = 200  # of the table in a log


@dataclass(kw_only=True)
class BenchConfig:
    """What is measured, and for how long."""

    suite: Literal["ops"] = option("ops", "this suite; suite=model trains a small model on the CPU")
    ops: list[str] = option(list(OPS), "operators; X_backward is forward and backward")
    shapes: list[str] = option([], "shapes such as 'B8 T4096 H32 P64 N128'; none: each operator's own")
    layouts: list[str] = option(list(LAYOUTS), "inputs of their own, or slices as in the layer")
    peers: list[str] = option(list(PEERS), "whom to compare with, if installed")
    seconds: float = option(0.2, "time that each measurement takes at least, compilation and checks aside")
    check: bool = option(True, "compare with the oracle first")
    json: str = option("runs/bench.json", "where the numbers go; the figure goes beside it")

    def __post_init__(self) -> None:
        require(0 < self.seconds <= 60, "seconds", self.seconds, "must be above 0 and at most 60")
        for peer in self.peers:
            require(peer in PEERS, "peers", self.peers, f"choose from [{', '.join(PEERS)}]")
        chosen(self.ops, self.shapes, self.layouts)


def run(config: BenchConfig) -> None:
    """Measure, print the table, write numbers and figure."""
    with user_errors():
        pairs = chosen(config.ops, config.shapes, config.layouts)
    if not torch.cuda.is_available():
        die("suite=ops: needs a CUDA device; suite=model measures a model on the CPU")
    from rich.console import Console

    from kernels.benchmarks import report

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    path, rows = Path(config.json), []
    machine = timing.machine()
    speeds = f"copy {machine.copy / 1e12:.2f} TB/s, bf16 product {machine.matmul / 1e12:.0f} TFLOP/s"
    console.print(f"{machine.name}: {speeds}")
    for line in absent(pairs, config.peers):
        console.print(line)
    for op, shape in pairs:
        rows.append(measured(op, shape, config, machine))
        report.write(path, asdict(config), machine, [row for group in rows for row in group])
        for row in rows[-1]:
            console.print(report.line(row), highlight=False)
        if any(word in row["error"] for row in rows[-1] for word in FATAL):
            console.print("the device is lost to this process: stopped here")
            break
    everything = [row for group in rows for row in group]
    console.print(report.table(everything))
    figure = report.figure(everything, path.with_suffix(".png"))
    console.print(f"numbers: {path}  figure: {figure}")


def absent(pairs: list[tuple[Op, Shape]], peers: list[str]) -> Iterator[str]:
    """One line a peer that an operator misses."""
    missing: dict[str, str] = {}
    for base in {op.base: None for op, _ in pairs}:
        for system, why in rivals.contenders(base, peers)[1].items():
            missing.setdefault(f"{system}: absent ({why})", base)
    return iter(missing)


def measured(op: Op, shape: Shape, config: BenchConfig, machine: Machine) -> list[dict[str, Any]]:
    """One row for us and one for each peer: its fastest variant that works, else its failure."""
    ours = Contender("ours", op.ours)
    rows: dict[str, dict[str, Any]] = {}
    for contender in [ours, *rivals.contenders(op.base, config.peers)[0]]:
        row = _row(op, shape, contender, config, machine)
        best = rows.get(contender.system)
        if best is None or best["ms"] is None or (row["ms"] is not None and row["ms"] < best["ms"]):
            rows[contender.system] = row
        gc.collect()
        torch.cuda.empty_cache()
    us = rows["ours"]["ms"]
    for row in rows.values():
        row["ratio"] = row["ms"] / us if row["ms"] is not None and us is not None else None
    return list(rows.values())


def _row(op: Op, shape: Shape, contender: Contender, config: BenchConfig, machine: Machine) -> dict[str, Any]:
    cost = op.cost(shape)
    limit_ms = 1e3 * machine.limit(cost)
    row: dict[str, Any] = {
        "op": op.name,
        "shape": str(shape),
        "layout": shape.layout,
        "system": contender.system,
        "variant": contender.variant,
        "limit_ms": limit_ms,
        "oracle_error": None,
        "ms": None,
        "error": "",
    }
    try:
        call, sets = op.call(contender.run), [_set(op, shape, contender)]
        first_call = timing.first_call(call, sets[0])
        if config.check:
            row["oracle_error"] = check.error(op, contender, shape)
        more = timing.sets_needed(size(sets[0])) - 1
        sets += [_set(op, shape, contender) for _ in range(more)]
        measurement = timing.measure(call, sets, op.graph, config.seconds)
    except Exception as error:  # a peer's failure is a result
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        return row
    seconds = measurement.ms / 1e3
    rates = {"gb_per_s": cost.bytes / seconds / 1e9, "tflop_per_s": cost.flops / seconds / 1e12}
    row |= {"first_call_s": first_call, "share_of_limit": limit_ms / measurement.ms}
    return row | asdict(measurement) | rates


def _set(op: Op, shape: Shape, contender: Contender) -> Inputs:
    """Fresh inputs, as the contender takes them."""
    given = op.inputs(shape, "cuda")
    return op.call(contender.run).prepared(contender.prepare(given), cotangent(given))

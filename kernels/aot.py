"""Compile every Triton kernel for a GPU that is not there, as our functions would launch it.

    python -m kernels.aot [ops=[scan,scan_backward]] [shapes=[B8 T4096 N64]] [configs=1] [json=PATH]

Reports registers, spilled bytes, stack and shared memory of each specialisation for Hopper (sm_90). It says
nothing of the numbers a kernel computes: only a GPU can.
"""

import contextlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from conf.load import from_command_line, user_errors
from conf.schema import option, require

SHARED_LIMIT = 227 * 1024  # bytes of shared memory that one block of Hopper may use
MOST_TOKENS = 1024  # a row, enough for every schedule; what is not a Triton kernel runs on this machine's CPU
_work: list[Any] = []  # launches, inherited by the forked workers


@dataclass(kw_only=True)
class AotConfig:
    """What to compile."""

    ops: list[str] = option([], "operators; none: all but the layer, which has no kernels of its own")
    shapes: list[str] = option([], "shapes such as 'B8 T4096 H32 P64 N128'; none: those of the benchmark")
    configs: int = option(3, "launch settings of each kernel to compile, the default first")
    workers: int = option(0, "processes; 0: one a CPU")
    json: str = option("runs/aot.json", "where the table goes")

    def __post_init__(self) -> None:
        require(1 <= self.configs <= 3, "configs", self.configs, "must be from 1 to 3")
        require(self.workers >= 0, "workers", self.workers, "must be at least 0")


@dataclass(frozen=True)
class Report:
    """What the compiler says of one specialisation. error: why it does not compile."""

    kernel: str
    shape: str
    settings: str
    registers: int = 0
    spilled_bytes: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def verdict(self) -> str:
        if self.error:
            return f"failed: {self.error}"
        if self.shared_bytes > SHARED_LIMIT:
            return "too much shared memory"
        return "spills" if self.spilled_bytes else "ok"


def launches_of(config: AotConfig) -> list[tuple[str, Any]]:
    """(shape, launch) of every specialisation, each at the first shape that needs it.

    Where a function fails before it launches, a line `op: error` stands in place of the launch.
    """
    from kernels.benchmarks.inputs import cotangent
    from kernels.benchmarks.launches import recorded
    from kernels.benchmarks.ops import OPS
    from kernels.benchmarks.shapes import LAYOUTS
    from kernels.benchmarks.suite import chosen
    from kernels.tuning import forced

    found: dict[Any, str] = {}
    names = config.ops or [name for name, op in OPS.items() if op.base != "layer"]
    for op, shape in chosen(names, config.shapes, LAYOUTS):
        few = replace(shape, length=min(shape.length, MOST_TOKENS))
        for index in range(config.configs):
            try:
                with recorded() as launches, forced("*", index):
                    given = op.inputs(few, "cpu")
                    call = op.call(op.ours)
                    call(call.prepared(given, cotangent(given)))
            except Exception as error:  # reported as a row: the other operators are compiled all the same
                found.setdefault(f"{op.name}: {type(error).__name__}: {error}", str(shape))
                break
            for launch in launches:
                found.setdefault(launch, str(shape))
    return [(shape, launch) for launch, shape in found.items()]


def compiled(launch: Any, shape: str) -> Report:
    """Compile one specialisation for sm_90."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    if isinstance(launch, str):  # the wrapper failed
        return Report(launch.split(":")[0], shape, "", error=launch.split(": ", 1)[1])
    names = [name for name, _ in launch.signature]
    source = (GluonASTSource if launch.kernel.is_gluon() else ASTSource)(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    start, log = time.perf_counter(), io.StringIO()
    try:
        # ptxas speaks only when it runs: the cache is passed over
        with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
            knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log = True, True
            binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(launch.options))
    except Exception as error:
        message = (str(error).strip().splitlines() or [""])[-1]
        return Report(launch.name, shape, launch.settings(), error=f"{type(error).__name__}: {message}")
    text, seconds = log.getvalue(), time.perf_counter() - start
    numbers: dict[str, Any] = {n: sum(map(int, re.findall(p, text))) for n, p in _PTXAS.items()}
    if not numbers["registers"]:
        return Report(launch.name, shape, launch.settings(), error="ptxas reported nothing")
    shared = binary.metadata.shared
    return Report(
        launch.name, shape, launch.settings(), **numbers, shared_bytes=shared, seconds=round(seconds, 2)
    )


_PTXAS = {
    "registers": r"Used (\d+) registers",
    "spilled_bytes": r"(\d+) bytes spill stores",
    "stack_bytes": r"(\d+) bytes stack frame",
}


def _compiled(index: int) -> Report:
    shape, launch = _work[index]
    return compiled(launch, shape)


def reports(config: AotConfig) -> list[Report]:
    """One report a specialisation."""
    from rich.progress import track

    _work[:] = launches_of(config)
    workers = config.workers or os.cpu_count() or 1
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        done = pool.imap(_compiled, range(len(_work)))
        return list(track(done, "compiling", total=len(_work), transient=True))


def show(rows: list[Report]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Triton kernels, compiled for sm_90")
    for name in ("kernel", "first at", "settings"):
        table.add_column(name, overflow="fold")
    for name in ("registers", "spilled B", "stack B", "shared KiB"):
        table.add_column(name, justify="right")
    table.add_column("verdict", overflow="fold")
    for r in sorted(rows, key=lambda r: (r.kernel, r.shape)):
        numbers = (r.registers, r.spilled_bytes, r.stack_bytes, f"{r.shared_bytes / 1024:.0f}")
        table.add_row(r.kernel, r.shape, r.settings, *map(str, numbers), r.verdict)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main() -> None:
    config = from_command_line(AotConfig, __doc__ or "")
    if os.environ.get("TRITON_INTERPRET") == "1":  # interpreted kernels cannot be compiled
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        raise SystemExit(
            subprocess.run([sys.executable, "-m", "kernels.aot", *sys.argv[1:]], env=environment).returncode
        )
    with user_errors():
        rows = reports(config)
    show(rows)
    path = Path(config.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(r) | {"verdict": r.verdict} for r in rows], indent=1))
    bad = [r for r in rows if r.verdict != "ok"]
    print(f"{len(rows)} specialisations, {len(bad)} not ok; table: {path}")
    raise SystemExit(1 if any(r.error for r in rows) else 0)


if __name__ == "__main__":
    main()

"""Fill the tuning cache of this GPU: time every launch setting of every kernel, keep the best.

    python -m kernels.warmup [ops=[scan_backward]] [shapes=[B1 T65536 H24 P64 N128]] [seconds=0.05]

Run it once a machine for the shapes that will be trained; `LONGSTATE_CACHE` moves the cache. Without it
kernels run with their first settings. A setting is judged by the time of the whole operator that uses it.
"""

import contextlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from conf.load import die, from_command_line, user_errors
from conf.schema import option, require

TRAINING = ("scan_backward", "step", "conv_backward", "norm_backward", "add_norm_backward")


@dataclass(kw_only=True)
class WarmupConfig:
    """What to tune."""

    ops: list[str] = option(list(TRAINING), "operators whose kernels are tuned")
    shapes: list[str] = option([], "shapes such as 'B8 T4096 H32 P64 N128'; none: those of the benchmark")
    layouts: list[str] = option(
        ["sliced", "contiguous"], "inputs as slices, as in the layer, or of their own"
    )
    seconds: float = option(0.05, "time spent on each setting")

    def __post_init__(self) -> None:
        require(0 < self.seconds <= 60, "seconds", self.seconds, "must be above 0 and at most 60")


@dataclass(frozen=True)
class Tuned:
    """One kernel and key: milliseconds of the operator with each setting, None where it failed."""

    entry: str
    op: str
    shape: str
    times: tuple[float | None, ...]

    @property
    def best(self) -> int | None:
        """The fastest setting; None where all failed."""
        worked = [(ms, index) for index, ms in enumerate(self.times) if ms is not None]
        return min(worked)[1] if worked else None


def tuned(
    op: Any, shape: Any, seconds: float, known: set[str], timer: Callable[..., list[float]]
) -> list[Tuned]:
    """Tune what `op` picks at `shape` and is not in `known`, one kernel after another, each with the best of
    those before it. timer(call, sets, seconds): milliseconds of calls."""
    from kernels.benchmarks.inputs import cotangent
    from kernels.tuning import forced, recorded

    call = op.call(op.ours)
    with recorded() as picked:
        given = op.inputs(shape, "cuda")
        inputs = call.prepared(given, cotangent(given))
        call(inputs)
    results = []
    with contextlib.ExitStack() as chosen:
        for entry, configs in picked.items():
            if entry in known or len(configs) == 1:
                continue
            times: list[float | None] = []
            for index in range(len(configs)):
                with forced(entry, index):
                    try:
                        times.append(statistics.median(timer(call, [inputs], seconds)))
                    except Exception:  # out of resources on this GPU: a setting that cannot win
                        times.append(None)
            results.append(Tuned(entry, op.name, str(shape), tuple(times)))
            if (best := results[-1].best) is not None:
                chosen.enter_context(forced(entry, best))
    return results


def show(results: list[Tuned]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="ms of the operator with each setting; the best in bold")
    for name in ("kernel and key", "judged by"):
        table.add_column(name, overflow="fold")
    for index in range(max((len(r.times) for r in results), default=0)):
        table.add_column(f"setting {index}", justify="right")
    for r in results:
        cells = ["failed" if ms is None else f"{ms:.4f}" for ms in r.times]
        if r.best is not None:
            cells[r.best] = f"[bold]{cells[r.best]}[/bold]"
        table.add_row(r.entry, f"{r.op} {r.shape}", *cells)
    Console().print(table)


def main() -> None:
    config = from_command_line(WarmupConfig, __doc__ or "")
    import torch
    from rich.progress import track

    from kernels.benchmarks.suite import chosen
    from kernels.benchmarks.timing import event_times
    from kernels.tuning import store

    with user_errors():
        pairs = chosen(config.ops, config.shapes, config.layouts)
    if not torch.cuda.is_available():
        die("kernels.warmup: needs a CUDA device; the CPU has nothing to tune")
    results: list[Tuned] = []
    for op, shape in track(pairs, "tuning", transient=True):
        results += tuned(op, shape, config.seconds, {r.entry for r in results}, event_times)
        torch.cuda.empty_cache()
    show(results)
    choices = {r.entry: r.best for r in results if r.best is not None}
    print(f"{len(choices)} choices: {store(choices)}")


if __name__ == "__main__":
    main()

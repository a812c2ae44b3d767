"""Time, temporaries and launches of one call on a GPU.

Calls take turns over enough sets of inputs that none is in the L2 cache when its turn comes. Before each the
device is kept waiting while the host launches: times are the device's, however busy the host; the host's own
is reported beside them.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.benchmarks.costs import Machine

FEWEST, MOST = 10, 200  # timed calls
MOST_SETS = 256
CYCLES = 2.5e9  # a second of waiting on the device, and some more
Call = Callable[[Any], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Measurement:
    """ms: median of one call on the device. spread_ms: between its quartiles. host_ms: what the host takes to
    launch it; above `ms`, a program that does nothing else waits for the host. temporaries_mib: peak memory
    less inputs, outputs and gradients. launches: kernels, copies and fills; None if the profiler fails."""

    ms: float
    spread_ms: float
    host_ms: float
    temporaries_mib: float
    launches: int | None


def machine() -> Machine:
    """This GPU's ceilings: a copy of 4 GiB, read plus written; an 8192^3 product of random bf16."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = statistics.median(event_times(target.copy_, [source], 0.1))
    del source, target
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = statistics.median(event_times(lambda a: (a @ b,), [a], 0.1))
    return Machine(torch.cuda.get_device_name(), 2 * 2**32 / copy * 1e3, 2 * 8192**3 / product * 1e3)


def sets_needed(set_bytes: int) -> int:
    """How many sets of inputs fill three L2 caches."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(MOST_SETS, -(-3 * cache // max(1, set_bytes))))


def measure(call: Call, sets: Sequence[Any], graph: bool, seconds: float) -> Measurement:
    """Measure `call(inputs)` for about `seconds`; graph: inside a CUDA graph, launches excluded."""
    temporaries, launches = _temporaries(call, sets[0]), _launches(call, sets[0])
    host_ms = 1e3 * _host_seconds(call, sets[0])
    times = graph_times(call, sets, seconds) if graph else event_times(call, sets, seconds)
    quartiles = statistics.quantiles(times, n=4)
    return Measurement(quartiles[1], quartiles[2] - quartiles[0], host_ms, temporaries, launches)


def first_call(call: Call, inputs: Any) -> float:
    """Seconds of the first call at a shape: compilation and tuning, where new, included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call(inputs)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def event_times(call: Callable[[Any], Any], sets: Sequence[Any], seconds: float) -> list[float]:
    """Milliseconds of each of many calls, each between two events."""
    turns, wait = itertools.cycle(sets), int(CYCLES * _host_seconds(call, sets[0]))

    def timed(count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for before, after in events:
            inputs = next(turns)
            torch.cuda._sleep(wait)
            before.record()
            call(inputs)
            after.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in events]

    timed(2)  # clocks, allocator
    return timed(_repeats(statistics.median(timed(3)), seconds))


def _host_seconds(call: Callable[[Any], Any], inputs: Any) -> float:
    """Until a call returns, its work on the device not waited for."""

    def once() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(inputs)
        return time.perf_counter() - start

    return statistics.median(once() for _ in range(5))


def graph_times(call: Callable[[Any], Any], sets: Sequence[Any], seconds: float) -> list[float]:
    """Milliseconds of a call: replays of a graph of at least 20 calls, divided by their number."""
    turns = list(itertools.islice(itertools.cycle(sets), max(20, len(sets))))
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for inputs in turns[:3]:
            call(inputs)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in turns:
            call(inputs)
    return [ms / len(turns) for ms in event_times(lambda _: graph.replay(), [None], seconds)]


def _repeats(ms: float, seconds: float) -> int:
    return max(FEWEST, min(MOST, round(1e3 * seconds / max(ms, 1e-3))))


def _temporaries(call: Call, inputs: Any) -> float:
    """MiB that a call holds at its peak beside its inputs and what it returns."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = call(inputs)
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before - kept
    del outputs
    return peak / 2**20


def _launches(call: Call, inputs: Any) -> int | None:
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call(inputs)
            torch.cuda.synchronize()
    except RuntimeError:  # counters are not open to every user of a machine
        return None
    on_device = (e for e in profiler.events() or () if e.device_type == torch.autograd.DeviceType.CUDA)
    return sum(1 for _ in on_device)

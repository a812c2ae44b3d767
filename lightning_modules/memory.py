"""The most memory that a process has held, and what to say when there is no more."""

import re
import resource
import sys
from pathlib import Path

import torch

from lightning_modules.run_dir import RunError


def peak_memory_mib(device: torch.device, *, graphed: bool = False) -> float:
    """graphed: what is reserved on a GPU, not what is allocated, where a graph's memory does not show while
    it is replayed."""
    peak = torch.cuda.max_memory_reserved(device) if graphed else peak_bytes(device)
    return peak / 2**20


def peak_bytes(device: torch.device) -> int:
    """Most memory that this process (or its share of the GPU) has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent held before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 2**10


def reset_peak_memory(device: torch.device) -> bool:
    """Begin to measure anew what `peak_memory_mib` tells; False where the system does not let us."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or a sandbox
        return False
    return True


def out_of_memory(error: BaseException, step: int, *, graphed: bool = False) -> RunError | None:
    """The one line for an allocation that failed; None for any other error.

    graphed: CUDA graphs keep memory of their own.
    """
    message = str(error)
    on_cpu = isinstance(error, MemoryError) or "can't allocate memory" in message
    if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
        return None
    tried = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", message)
    what = f" for another {tried[1]}" if tried else ""
    without = "train without graphs (trainer.cuda_graphs=false), " if graphed else ""
    return RunError(
        f"after step {step}: no {'' if on_cpu else 'GPU '}memory{what}: {without}read fewer tokens at a time "
        "(trainer.segment_length) or fewer rows (trainer.accumulate), or shard parameters "
        "(trainer.strategy=deepspeed); python -m lightning_modules.plan with the same settings says what fits"
    )

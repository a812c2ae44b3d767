"""The most memory that a process has held."""

import resource
import sys
from pathlib import Path

import torch


def peak_memory_mib(device: torch.device) -> float:
    return peak_bytes(device) / 2**20


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

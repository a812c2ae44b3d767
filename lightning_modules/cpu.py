"""Settings of this process that make the CPU path fast."""

import ctypes
import platform

from kernels.native.build import cpu_features

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc refuses more
_MAPPED_BYTES = 256 * 2**10


LONG = 8192  # tokens that a process reads at a time


def settle_memory(tokens: int, in_segments: bool) -> None:
    """How glibc treats freed memory, by the tokens that the process reads at a time: speed matters where they
    are few, memory where they are many."""
    if in_segments or tokens >= LONG:
        map_large_tensors()
    else:
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc hand freed activations out again instead of returning them to the kernel.

    Without this every tensor of a few MiB is mapped, faulted in page by page and unmapped again: a tenth of a
    training step on the CPU. Does nothing on other C libraries. Memory in use does not grow; memory kept by
    the process stays at its peak.
    """
    _mallopt({_M_MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD, _M_TRIM_THRESHOLD: 2**31 - 1})


def map_large_tensors() -> None:
    """Let glibc map every large tensor by itself: what training in segments needs on the CPU.

    A border's state lives through the whole step. In the hole that a freed activation leaves, it makes the
    hole too small for the next one: memory would grow with every segment, by as much as if all were kept.
    """
    _mallopt({_M_MMAP_THRESHOLD: _MAPPED_BYTES})


def _mallopt(settings: dict[int, int]) -> None:
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for name, value in settings.items():
            libc.mallopt(name, value)


def has_native_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices itself. Emulated, they are some 15 times slower than fp32.

    AVX512_BF16 or AMX on x86, the BF16 extension on ARM. True where the system does not tell (not Linux).
    """
    features = cpu_features()
    return not features or bool(features & {"avx512_bf16", "amx_bf16", "bf16"})

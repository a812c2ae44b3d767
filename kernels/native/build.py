"""Compile the C kernels at the first use on this machine, load them, and call them with tensors.

The library lies in the user's cache directory under a hash of its source, the flags and the CPU's features.
It links nothing but the C library: threads are those of the OpenMP runtime that libtorch is bound to, found
through libtorch itself. Without a compiler the callers keep to PyTorch, and one line says so.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from kernels.cache import cache_directory

SOURCES = ("native.h", "parallel.c", "conv.c", "norm.c", "scan.c")
# No -ffast-math: it would let sums be reordered where their order matters, and switch the whole process to
# flushing denormal numbers when the library is loaded. Sums that may be reordered say so in the source.
# As fast as -O3 here, and compiled in three quarters of its time.
FLAGS = ["-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic"]
FLAGS += ["-march=native", "-std=gnu11", "-fPIC", "-shared"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
# Loops begin where the data does, not at the next aligned address: sums must not depend on addresses.
FLAGS += ["--param", "vect-max-peeling-for-alignment=0"]
SWITCH = "LONGSTATE_NATIVE"
COMPILE_SECONDS = 120
MAX_DIMS = 6
DTYPES = {torch.float32: 0, torch.bfloat16: 1}

logger = logging.getLogger(__name__)


def usable(*tensors: Tensor | None) -> bool:
    """Whether the C kernels take these: on the CPU, in fp32 or bf16, and the library is there.

    The environment variable LONGSTATE_NATIVE=0 turns them off.
    """
    return (
        all(t is None or (t.device.type == "cpu" and t.dtype in DTYPES) for t in tensors)
        and os.environ.get(SWITCH, "1") != "0"
        and library() is not None
    )


def call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Run a kernel. Its struct of arguments begins with the number of threads; here is the rest, in order.

    Tensors: fp32, bf16 or bool, at most 6 dimensions, stride 1 in the last (`rows`); None for one left out.
    """
    words = [torch.get_num_threads()]
    for value in arguments:
        if isinstance(value, Tensor):
            strides = value.stride()
            dense = not strides or strides[-1] == 1 or value.shape[-1] == 1 or not value.numel()
            assert dense, (name, value.shape, strides)
            padding = (0,) * (MAX_DIMS - len(strides))
            words += (value.data_ptr(), DTYPES.get(value.dtype, 0), *strides, *padding)
        elif value is None:
            words += (0,) * (MAX_DIMS + 2)
        elif isinstance(value, float):
            words += struct.unpack("q", struct.pack("d", value))
        else:
            words.append(value)
    loaded = library()
    assert loaded is not None
    getattr(loaded, name)((ctypes.c_int64 * len(words))(*words))


def rows(t: Tensor) -> Tensor:
    """t, or a copy of it if its last dimension is not contiguous."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, compiled if need be; None, with a line in the log, where that is not possible."""
    try:
        loaded = ctypes.CDLL(str(compiled()))
    except (OSError, RuntimeError) as error:
        logger.warning("no compiled CPU kernels, PyTorch's slower passes run instead: %s", error)
        return None
    loaded.set_runtime(*_openmp())
    return loaded


def compiled() -> Path:
    """Path of the library, compiled first if the cache lacks it.

    Raises RuntimeError, of one line, without a compiler or if it fails; OSError if the cache is read-only.
    """
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for part in (*[(folder / name).read_bytes() for name in SOURCES], *map(str.encode, (*FLAGS, _cpu()))):
        digest.update(part + b"\0")
    path = cache_directory() / f"native-{digest.hexdigest()[:16]}.so"
    if not path.is_file():
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise RuntimeError("no C compiler (cc or gcc) found; install gcc")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whoever comes second replaces a library by an equal one; who has loaded the first keeps it.
        handle, partial = tempfile.mkstemp(suffix=".partial", dir=path.parent)
        os.close(handle)
        try:
            sources = [str(folder / name) for name in SOURCES if name.endswith(".c")]
            _run([compiler, *FLAGS, *sources, "-lm", "-o", partial])
            os.replace(partial, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
    return path


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} took longer than {COMPILE_SECONDS} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise RuntimeError(f"{command[0]} failed: {lines[0] if lines else done.returncode}")


def cpu_features() -> frozenset[str]:
    """What the CPU says it can do, in the kernel's words (Linux; empty elsewhere)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def _cpu() -> str:
    """What -march=native depends on."""
    return " ".join([platform.machine(), *sorted(cpu_features())])


def _openmp() -> tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]:
    """Entry points of the OpenMP runtime that libtorch is bound to; null pointers without: one thread.

    A symbol asked of a library is looked up in what that library itself loaded: never in another runtime that
    happens to be in the process.
    """
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        found = [ctypes.cast(getattr(torch_cpu, name), ctypes.c_void_p) for name in names]
    except (OSError, AttributeError) as error:
        logger.warning("torch's OpenMP runtime not found, compiled CPU kernels run on one thread: %s", error)
        found = [ctypes.c_void_p(None)] * len(names)
    return found[0], found[1], found[2]

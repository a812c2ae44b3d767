"""Choice of launch settings for Triton kernels: a few configs a kernel, measured once by `kernels.warmup`.

Nothing is measured during training: `pick` answers at once, from the cache on disk where `python -m
kernels.warmup` has measured this key on this GPU, else with the kernel's first config. Tests force each.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kernels.cache import cache_directory

MOST_CONFIGS = 3
_forced: dict[str, int] = {}
_recorders: list[dict[str, tuple["Config", ...]]] = []


@dataclass(frozen=True)
class Config:
    """Launch settings; `meta` are the kernel's own constexpr parameters."""

    num_warps: int = 4
    num_stages: int = 2
    meta: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        return {**self.meta, "num_warps": self.num_warps, "num_stages": self.num_stages}


def pick(kernel: str, configs: Sequence[Config], **key: Any) -> Config:
    """The config of `kernel` for `key`: shapes and dtypes; lengths and batches rounded by the caller."""
    assert 1 <= len(configs) <= MOST_CONFIGS, kernel
    name = entry(kernel, **key)
    for seen in _recorders:
        seen[name] = tuple(configs)
    for chosen in (name, kernel, "*"):
        if chosen in _forced:
            return configs[_forced[chosen] % len(configs)]
    index = _table().get(name, 0)
    return configs[index] if index < len(configs) else configs[0]


def entry(kernel: str, **key: Any) -> str:
    """The cache's name of a kernel and key."""
    return kernel + " " + " ".join(f"{name}={value}" for name, value in sorted(key.items()))


def bucket(count: int) -> int:
    """Lengths and batches within a factor of two share a config."""
    return 1 << max(0, count - 1).bit_length()


@contextlib.contextmanager
def forced(kernel: str, index: int) -> Iterator[None]:
    """Use config `index`, modulo their number, whatever the cache says.

    kernel: its name, an `entry`, or "*" for every kernel.
    """
    _forced[kernel] = index
    try:
        yield
    finally:
        del _forced[kernel]


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, tuple[Config, ...]]]:
    """Collects what is picked inside: entry -> the configs it was picked from."""
    seen: dict[str, tuple[Config, ...]] = {}
    _recorders.append(seen)
    try:
        yield seen
    finally:
        _recorders.remove(seen)


def cache_path() -> Path:
    """Where this GPU's choices are kept."""
    device = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    return cache_directory() / f"tuning-{device}.json"


@functools.cache
def _table() -> dict[str, int]:
    path = cache_path()
    return json.loads(path.read_text()) if path.is_file() else {}


def store(choices: dict[str, int]) -> Path:
    """Merge choices into the cache, atomically, and use them from now on."""
    path = cache_path()
    merged = {**_table(), **choices}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(merged, indent=1, sort_keys=True))
    partial.replace(path)
    _table.cache_clear()
    return path

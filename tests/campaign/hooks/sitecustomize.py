"""Run by Python at the start of every process of the sweep under test: kills at borders, a clock that jumps.

A border is armed by a file in $CAMPAIGN_HOME/armed, BORDER.before or BORDER.after. The first process that
comes there takes the file away and kills itself by SIGKILL: before the border is crossed, or just after.

The clock: $CAMPAIGN_HOME/clock holds seconds that are added to time.time, time.time_ns and datetime.now in
Optuna's storages. The monotonic clock stays, as it does when somebody sets a host's clock. The times of files
would jump then: here they do not, and neither do the clocks of C libraries and of PostgreSQL.
"""

import contextlib
import datetime
import importlib.abc
import importlib.util
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOME = Path(os.environ["CAMPAIGN_HOME"])
ARMED, FIRED = HOME / "armed", HOME / "fired"
FILES = {  # by the name that appears
    "checkpoint": re.compile(r"/step=\d+\.ckpt$"),
    "result": re.compile(r"/trial-\d+(/evaluation)?/result\.json$"),
    "mkdir": re.compile(r"/trial-\d+$"),
}
FUNCTIONS = {  # module: (class or None, function, border)
    "sweeps.trials.claims": (None, "suggest", "ask"),
    "optuna.study.study": ("Study", "tell", "tell"),
    "mlflow.tracking.client": ("MlflowClient", "set_terminated", "mlflow-end"),
}
CLOCKED = ("optuna.storages.journal._storage", "optuna.storages._rdb.storage", "optuna.storages._in_memory")


def die_if_armed(border: str, side: str) -> None:
    name = f"{border}.{side}"
    if not (ARMED / name).exists():
        return
    with contextlib.suppress(FileNotFoundError):  # another process was first
        os.rename(ARMED / name, FIRED / f"{name}.{os.getpid()}.{time.monotonic_ns()}")
        os.kill(os.getpid(), signal.SIGKILL)


def guarded(function: Callable[..., Any], border_of: Callable[..., str | None]) -> Callable[..., Any]:
    def guard(*arguments: Any, **named: Any) -> Any:
        border = border_of(*arguments)
        if border is None:
            return function(*arguments, **named)
        die_if_armed(border, "before")
        result = function(*arguments, **named)
        die_if_armed(border, "after")
        return result

    return guard


def file_border(path: Any) -> str | None:
    text = os.fspath(path)
    return next(
        (name for name, pattern in FILES.items() if isinstance(text, str) and pattern.search(text)), None
    )


os.replace = guarded(os.replace, lambda source, target, *_: file_border(target))
os.mkdir = guarded(os.mkdir, lambda path, *_: file_border(path))


_real_time, _real_time_ns = time.time, time.time_ns
_clock: tuple[int, float] = (0, 0.0)  # mtime of the file that was read, and what it said


def offset() -> float:
    global _clock
    try:
        changed = os.stat(HOME / "clock").st_mtime_ns
        if changed != _clock[0]:
            _clock = (changed, float((HOME / "clock").read_text()))
    except (OSError, ValueError):
        return _clock[1]
    return _clock[1]


time.time = lambda: _real_time() + offset()
time.time_ns = lambda: _real_time_ns() + int(offset() * 1e9)


class Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> "Shifted":
        return cls.fromtimestamp(time.time(), tz)


class AfterImport(importlib.abc.MetaPathFinder):
    """Lets the modules named above load as usual, then changes them."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in FUNCTIONS and name not in CLOCKED:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            change(name, module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def change(name: str, module: Any) -> None:
    if name in CLOCKED and hasattr(module, "datetime"):
        module.datetime = Shifted
    if name in FUNCTIONS:
        owner, function, border = FUNCTIONS[name]
        holder = getattr(module, owner) if owner else module
        setattr(holder, function, guarded(getattr(holder, function), lambda *_: border))


sys.meta_path.insert(0, AfterImport())

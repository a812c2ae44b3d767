"""A search space as YAML writes it -> checked names with their values or ranges.

space:
  model.d_state: [16, 64]                       # values: every sampler
  optim.lr: {low: 1.0e-4, high: 1.0e-2, log: true}   # a range: random and tpe
"""

import difflib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conf.load import flatten
from conf.schema import require

Point = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from low to high, both included; integers where the setting is one."""

    low: float
    high: float
    log: bool = False
    integer: bool = False


Space = dict[str, list[Any] | Range]


def unfold(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested sections -> dotted names; a later spelling of one name wins. Ranges and lists are leaves."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value and not _is_range(value):
            for child, leaf in unfold(value).items():
                flat[f"{name}.{child}"] = leaf
        else:
            flat[name] = value
    return flat


def parse_space(where: str, settings: Mapping[str, Any], base: Any) -> Space:
    """Check the names against the config `base`; raises ValueError with the nearest name."""
    known = flatten(base)
    space: Space = {}
    for name, value in unfold(settings).items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "see `python -m lightning_modules.train --help`"
            raise ValueError(f"{where}: {name} is no setting; {hint}")
        space[name] = _parse_values(f"{where}.{name}", value, known[name])
    return space


def grid(space: Space) -> list[Point]:
    """Every combination of the values, the last name changing fastest."""
    for name, values in space.items():
        require(not isinstance(values, Range), name, values, "a grid needs a list; a range needs sampler=tpe")
    values = [list(v) for v in space.values() if not isinstance(v, Range)]
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*values)]


def corners(space: Space) -> list[Point]:
    """The two points of all first (lowest) and all last (highest) values: what can be checked of a range."""
    ends = {name: (v.low, v.high) if isinstance(v, Range) else (v[0], v[-1]) for name, v in space.items()}
    return [{name: pair[i] for name, pair in ends.items()} for i in (0, 1)]


def _is_range(value: Mapping[str, Any]) -> bool:
    return "low" in value or "high" in value


def _parse_values(name: str, value: Any, default: Any) -> list[Any] | Range:
    if isinstance(value, list):
        require(len(value) > 0, name, value, "give at least one value")
        scalar = all(v is None or isinstance(v, bool | int | float | str) for v in value)
        require(scalar, name, value, "each value must be a number, a text, a bool or null")
        require(len(value) == len(set(value)), name, value, "each value once")
        return value
    remedy = "write a list of values or {low: ..., high: ..., log: true}"
    require(
        isinstance(value, Mapping) and {"low", "high"} <= set(value) <= {"low", "high", "log"},
        name,
        value,
        remedy,
    )
    low, high, log = value["low"], value["high"], value.get("log", False)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (low, high))
    require(numbers and isinstance(log, bool), name, value, remedy)
    require(low < high and (low > 0 or not log), name, value, "needs low < high, and low > 0 with log")
    integer = isinstance(low, int) and isinstance(high, int) and not isinstance(default, float)
    return Range(low=low, high=high, log=log, integer=integer)

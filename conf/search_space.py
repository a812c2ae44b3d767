"""A search space as YAML writes it -> checked names with their values or ranges.

space:
  model.d_state: [16, 64]                                     # values: every sampler
  optim.lr: {low: 1.0e-4, high: 1.0e-2, log: true}            # a range: every sampler but grid
  model.d_model: {low: 64, high: 512, power_of_two: true}     # 64, 128, 256, 512: every sampler
  initial_state.name: [zero, noise]
  initial_state.std: {values: [0.5, 1.0], when: {initial_state.name: noise}}   # else as in base
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from conf.load import flatten
from conf.schema import is_power_of_two, require

Point = dict[str, Any]
When = dict[str, list[Any]]  # names of the space above it -> the values with which a part of the space holds


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Values of which any may be chosen."""

    values: list[Any]
    when: When = field(default_factory=dict)

    @property
    def ends(self) -> tuple[Any, Any]:
        return self.values[0], self.values[-1]


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from low to high, both included; integers where the setting is one."""

    low: float
    high: float
    log: bool = False
    integer: bool = False
    power_of_two: bool = False
    when: When = field(default_factory=dict)

    @property
    def exponents(self) -> tuple[int, int]:
        """Of a power-of-two range: log2 of its ends."""
        return int(self.low).bit_length() - 1, int(self.high).bit_length() - 1

    @property
    def values(self) -> list[int]:
        """Of a power-of-two range: all its numbers."""
        first, last = self.exponents
        return [2**exponent for exponent in range(first, last + 1)]

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high


Space = dict[str, Choices | Range]

FORMS = (
    "write a list of values or {low: ..., high: ..., log: true}; power_of_two: true in place of log, "
    "{values: [...]} for a list, and when: {name: value} where it holds"
)


def unfold(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested sections -> dotted names; a later spelling of one name wins. Ranges and lists are leaves."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value and not _is_leaf(value):
            for child, leaf in unfold(value).items():
                flat[f"{name}.{child}"] = leaf
        else:
            flat[name] = value
    return flat


def parse_space(where: str, settings: Mapping[str, Any], base: Any, prefix: str = "") -> Space:
    """Check the names against the config `base`; raises ValueError with the nearest name.

    prefix: what the names of `when` lack, as the names of `settings` do not.
    """
    known = flatten(base)
    space: Space = {}
    for name, value in unfold(settings).items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "see `python -m lightning_modules.train --help`"
            raise ValueError(f"{where}: {name} is no setting; {hint}")
        space[name] = _parse_values(f"{where}.{name}", value, known[name], space, prefix)
    return space


def holds(when: When, point: Point) -> bool:
    """Whether a part of the space holds at a point, whose names above it are set."""
    return all(name in point and point[name] in values for name, values in when.items())


def grid(space: Space) -> list[Point]:
    """Every combination of the values, the last name changing fastest; each part only where it holds."""
    points: list[Point] = [{}]
    for name, part in space.items():
        require(
            isinstance(part, Choices) or part.power_of_two,
            name,
            _written(part),
            "a grid needs a list; a range needs sampler=tpe, gp, qmc or random",
        )
        points = [
            point | {name: value} if value is not _ABSENT else point
            for point in points
            for value in (part.values if holds(part.when, point) else [_ABSENT])
        ]
    return points


def corners(space: Space) -> list[Point]:
    """Points that show every end of every range and every value of every list: what can be checked of a
    space that has no grid. Each part appears where it holds."""
    low = _complete(space, {}, end=0)
    points = [low, _complete(space, {}, end=1)]
    for name, part in space.items():
        wanted = {needed: values[0] for needed, values in _ancestry(space, name).items()}
        values = part.values if isinstance(part, Choices) else part.ends
        points += [_complete(space, wanted | {name: value}, end=0) for value in values]
    return [point for i, point in enumerate(points) if point not in points[:i]]


def require_inside(where: str, point: Point, space: Space) -> None:
    """Refuse a point that names what the space lacks, or a value outside of it. It may leave names out."""
    for name, value in point.items():
        require(name in space, where, name, f"is not in the space: choose from {', '.join(space)}")
        part = space[name]
        if isinstance(part, Choices) or part.power_of_two:
            require(value in part.values, f"{where}.{name}", value, f"is not among {part.values}")
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            inside = number and part.low <= value <= part.high
            require(inside, f"{where}.{name}", value, f"must lie in [{part.low}, {part.high}]")


_ABSENT = object()


def _complete(space: Space, wanted: Point, end: int) -> Point:
    point: Point = {}
    for name, part in space.items():
        if holds(part.when, point):
            point[name] = wanted.get(name, part.ends[end])
    return point


def _ancestry(space: Space, name: str) -> When:
    """Conditions of a part and of what its conditions name."""
    conditions = dict(space[name].when)
    for needed in space[name].when:
        conditions = _ancestry(space, needed) | conditions
    return conditions


def _is_leaf(value: Mapping[str, Any]) -> bool:
    return "low" in value or "high" in value or "values" in value


def _parse_values(name: str, value: Any, default: Any, above: Space, prefix: str) -> Choices | Range:
    if isinstance(value, list):
        return _parse_choices(name, value, {})
    require(isinstance(value, Mapping), name, value, FORMS)
    settings = dict(value)
    when = _parse_when(name, settings.pop("when", {}), above, prefix)
    if set(settings) == {"values"} and isinstance(settings["values"], list):
        return _parse_choices(name, settings["values"], when)
    allowed = {"low", "high"} <= set(settings) <= {"low", "high", "log", "power_of_two"}
    require(allowed, name, value, FORMS)
    low, high = settings["low"], settings["high"]
    log, power = settings.get("log", False), settings.get("power_of_two", False)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (low, high))
    require(numbers and isinstance(log, bool) and isinstance(power, bool), name, value, FORMS)
    require(low < high and (low > 0 or not log), name, value, "needs low < high, and low > 0 with log")
    integer = isinstance(low, int) and isinstance(high, int) and not isinstance(default, float)
    if power:
        both = integer and is_power_of_two(low) and is_power_of_two(high) and not log
        require(
            both, name, value, "power_of_two needs powers of two as low and high, e.g. 16 and 256; no log"
        )
    return Range(low=low, high=high, log=log, integer=integer, power_of_two=power, when=when)


def _parse_choices(name: str, values: list[Any], when: When) -> Choices:
    require(len(values) > 0, name, values, "give at least one value")
    scalar = all(v is None or isinstance(v, bool | int | float | str) for v in values)
    require(scalar, name, values, "each value must be a number, a text, a bool or null")
    require(len(values) == len(set(values)), name, values, "each value once")
    return Choices(values=values, when=when)


def _parse_when(name: str, when: Any, above: Space, prefix: str) -> When:
    """`when: {initial_state.name: noise}` or `[noise, fitted_noise]`, of a list further up in the space."""
    remedy = "write when: {name: value} or {name: [value, ...]}"
    require(isinstance(when, Mapping), f"{name}.when", when, remedy)
    parsed: When = {}
    for written, values in unfold(when).items():
        needed = prefix + written
        place = f"{name}.when.{written}"
        part = above.get(needed)
        require(
            part is not None, place, values, "is not above it in the space: write the list it names first"
        )
        assert part is not None
        listed = isinstance(part, Choices) or part.power_of_two
        require(listed, place, values, "is a range: only values of a list can be named")
        wanted = values if isinstance(values, list) else [values]
        known = all(value in part.values for value in wanted) and bool(wanted)
        require(known, place, values, f"is not among its values {part.values}")
        parsed[needed] = wanted
    return parsed


def _written(part: Choices | Range) -> Any:
    if isinstance(part, Choices):
        return part.values
    return {"low": part.low, "high": part.high} | ({"log": True} if part.log else {})

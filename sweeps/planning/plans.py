"""What a stage is to try: planned trials by key. A plan that lists a key again adds nothing."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from conf.search_space import Choices, Point, Range, Space, grid, holds
from conf.sweep_schema import SweepConfig, train_baselines, train_space


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One planned trial: the parameters that are fixed (the sampler sets the others) and what it carries."""

    fixed: Point
    attributes: dict[str, Any]


Plan = dict[str, Planned]


def plan_points(points: Iterable[Point], seeds: Iterable[int | None]) -> Plan:
    """Every point of the space with every seed; None where nothing takes a seed."""
    plan = {}
    for seed in seeds:
        for point in points:
            plan[json.dumps(point | {"seed": seed})] = Planned(fixed=point, attributes={"seed": seed})
    return plan


def plan_given(points: Iterable[Point], seeds: Iterable[int | None]) -> Plan:
    """Points that no sampler touches, in or outside the space: the baseline, what a confirmation compares,
    what a search asks for next."""
    return {
        json.dumps(point | {"seed": seed}): Planned(fixed={}, attributes={"point": point, "seed": seed})
        for seed in seeds
        for point in points
    }


def plan_samples(count: int, seeds: Sequence[int | None]) -> Plan:
    """`count` trials whose points the sampler chooses when they start; the seeds take turns."""
    turns = [seeds[i % len(seeds)] for i in range(count)]
    return {f"sample-{i}": Planned(fixed={}, attributes={"seed": seed}) for i, seed in enumerate(turns)}


def plan_mitigations(names: Iterable[str], count: int) -> Plan:
    """`count` trials of every mitigation, taking turns; the sampler chooses their settings."""
    return {
        f"{name}-{i}": Planned(fixed={"mitigation.name": name}, attributes={"seed": None})
        for i in range(count)
        for name in names
    }


def plan_training(config: SweepConfig, count: int) -> Plan:
    """The training stage's first `count` trials (of a grid: all of them).

    Baselines come first. With every_seed only the first seed of a point is planned here: `plan_siblings`
    adds the others once its point is chosen.
    """
    stage, space = config.train, train_space(config)
    if stage.sampler == "grid":
        return plan_points(grid(space), stage.seeds)
    points = -(-count // len(stage.seeds)) if stage.every_seed else count
    plan = plan_samples(points, stage.seeds[:1] if stage.every_seed else stage.seeds)
    fixed = train_baselines(config)
    if stage.sampler == "qmc":
        fixed += qmc_points(space, points, config.seed)
    keys = list(plan)
    for key, point in zip(keys, fixed, strict=False):
        plan[key] = Planned(fixed=point, attributes=plan[key].attributes)
    return plan


def plan_siblings(key: str, point: Point, seeds: Iterable[int]) -> Plan:
    """The point of the trial planned as `key` with further seeds."""
    return {f"{key}/seed-{seed}": Planned(fixed=point, attributes={"seed": seed}) for seed in seeds}


def qmc_points(space: Space, count: int, seed: int) -> list[Point]:
    """The first `count` points of a scrambled Sobol sequence over the space: the same at every start."""
    if not count:
        return []
    from scipy.stats import qmc

    sequence = qmc.Sobol(d=len(space), scramble=True, rng=seed)
    # Sobol points balance in powers of two; the first `count` of the next one are the same sequence.
    rows = sequence.random_base2((count - 1).bit_length())[:count]
    return [_at(space, [float(share) for share in row]) for row in rows]


def _at(space: Space, shares: Sequence[float]) -> Point:
    """The point at the given share of each part's range, from 0 to 1."""
    point: Point = {}
    for (name, part), share in zip(space.items(), shares, strict=True):
        if not holds(part.when, point):
            continue
        if isinstance(part, Choices) or part.power_of_two:
            point[name] = part.values[min(len(part.values) - 1, int(share * len(part.values)))]
        else:
            point[name] = _between(part, share)
    return point


def _between(part: Range, share: float) -> float:
    """Integers have equal shares each."""
    low, high = (part.low - 0.5, part.high + 0.5) if part.integer else (part.low, part.high)
    value = low * (high / low) ** share if part.log else low + (high - low) * share
    value = min(part.high, max(part.low, round(value) if part.integer else value))
    return int(value) if part.integer else value

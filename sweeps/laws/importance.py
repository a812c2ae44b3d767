"""Which setting decides: of a measure's variance over the solved runs, the share that one setting explains.

Eta squared of a one-way analysis of variance: levels of the setting are the groups. It counts main effects
only; what settings do together, and what seeds do, is left over.
"""

from collections.abc import Callable

import numpy as np

from sweeps.laws.capacity import Capacity
from sweeps.laws.outcomes import Judged

Factor = Callable[[Judged], float]


def factors(found: Capacity) -> dict[str, Factor]:
    """Settings that vary over the judged runs, by short name."""
    runs = list(found.judged.values())
    columns: dict[str, Factor] = {"training length": lambda judged: judged.run.length}
    for name in dict.fromkeys(key for size in found.sizes for key in size.point):
        columns[name.rsplit(".", 1)[-1]] = _setting(name)
    columns["seed"] = lambda judged: judged.run.seed
    columns["retry"] = lambda judged: judged.run.attempt
    return {name: read for name, read in columns.items() if len({read(judged) for judged in runs}) > 1}


def shares(found: Capacity, measure: Factor) -> dict[str, float]:
    """Setting -> eta squared of `measure` over the solved runs."""
    solved = [judged for judged in found.judged.values() if judged.outcome != "unsolved"]
    return {
        name: eta_squared([read(judged) for judged in solved], [measure(judged) for judged in solved])
        for name, read in factors(found).items()
    }


def eta_squared(levels: list[float], values: list[float]) -> float:
    """Variance between the means of the groups over the variance of all; 0 where nothing varies."""
    y, groups = np.array(values), np.unique(levels, return_inverse=True)[1]
    if len(y) == 0 or np.ptp(y) == 0:
        return 0.0
    count = np.bincount(groups)
    means = np.bincount(groups, y) / count
    return float((count * (means - y.mean()) ** 2).sum() / ((y - y.mean()) ** 2).sum())


def _setting(name: str) -> Factor:
    return lambda judged: judged.measured.point[name]

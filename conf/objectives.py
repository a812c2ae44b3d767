"""What a sweep improves and what it must keep to: metrics by name, and bounds on them."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from conf.fields import require

Direction = Literal["maximize", "minimize"]
BROKEN = 1e9
BOUND = re.compile(r"^\s*([\w./-]+)\s*(<=|>=)\s*(\S+)\s*$")


@dataclass(frozen=True, kw_only=True)
class Bound:
    """`peak_memory_mib <= 4000` or `val/exact >= 0.9`."""

    metric: str
    at_most: bool
    limit: float

    @classmethod
    def parse(cls, where: str, text: str) -> "Bound":
        match = BOUND.match(text)
        remedy = "write METRIC <= NUMBER or METRIC >= NUMBER, e.g. peak_memory_mib <= 4000"
        require(match is not None, where, text, remedy)
        assert match is not None
        metric, sign, number = match.groups()
        try:
            limit = float(number)
        except ValueError:
            raise ValueError(f"{where}={text}: {remedy}") from None
        return cls(metric=metric, at_most=sign == "<=", limit=limit)

    def excess(self, value: float) -> float:
        """By how much a value breaks the bound; at most 0 where it holds. Infinity breaks it far."""
        if not math.isfinite(value):
            return BROKEN
        return value - self.limit if self.at_most else self.limit - value

    def __str__(self) -> str:
        return f"{self.metric} {'<=' if self.at_most else '>='} {self.limit:g}"

"""Fixtures of the operator tests: random arguments of the SSD scan, drawn by hypothesis and made by torch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from kernels.ssd import Mitigation, ssd_scan

Leaves = dict[str, Tensor]
FACTORS = ("alpha_scale", "insert_scale", "delta_scale", "decay_scale")
TOKENWISE = ("x", "dt", "B", "C")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill every `torch.empty` with NaN, so that reading what was never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True, kw_only=True)
class ScanCase:
    """One call of `ssd_scan`: sizes, options and the seed of its tensors.

    regime: retention per token. "ordinary": 0.2 to 0.999. "slow": 1 - 1e-7. "fast": exp(-50).
    "mixed": slow, ordinary and fast tokens in one head, as a selective model makes them.
    documents: per row, the tokens that start a document; None: no `document_starts`.
    factors: of the mitigation, as floats or as one value per head (then tensors with gradients).
    """

    batch: int = 2
    length: int = 70
    heads: int = 4
    headdim: int = 3
    groups: int = 2
    d_state: int = 5
    chunk_size: int = 16
    regime: str = "ordinary"
    D: str = "none"
    initial_state: bool = False
    dt_bias: bool = False
    dt_softplus: bool = False
    dt_limit: tuple[float, float] | None = None
    documents: tuple[frozenset[int], ...] | None = None
    factors: dict[str, float | list[float]] = field(default_factory=dict)
    seed: int = 0

    def leaves(self, dtype: torch.dtype = torch.float32) -> Leaves:
        """Fresh tensor arguments that record gradients; x, dt, B and C in `dtype`."""
        generator = torch.Generator().manual_seed(self.seed)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.empty(shape).uniform_(low, high, generator=generator)

        tokens = (self.batch, self.length, self.heads)
        if self.regime == "ordinary":
            dt, A = uniform(-5.0, 0.5, *tokens).exp(), -uniform(0.1, 1.0, self.heads)
        elif self.regime == "slow":
            dt, A = uniform(0.5, 1.0, *tokens), -uniform(0.9e-7, 1.1e-7, self.heads)
        elif self.regime == "fast":
            dt, A = uniform(0.9, 1.1, *tokens), -uniform(45.0, 55.0, self.heads)
        else:
            dt, A = uniform(-12.0, 1.2, *tokens).exp(), -uniform(1.0, 16.0, self.heads)
        bias = uniform(0.0, 0.3, self.heads) if self.dt_bias else torch.zeros(self.heads)
        if self.dt_softplus:  # its inverse, so that the retention keeps its regime
            dt = dt + torch.log(-torch.expm1(-dt)) - bias
        shapes = {
            "x": (*tokens, self.headdim),
            "B": (self.batch, self.length, self.groups, self.d_state),
            "C": (self.batch, self.length, self.groups, self.d_state),
            "D": (self.heads, self.headdim) if self.D == "channel" else (self.heads,),
            "initial_state": (self.batch, self.heads, self.headdim, self.d_state),
        }
        values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        values |= {"dt": dt, "A": A, "dt_bias": bias}
        values |= {f: torch.tensor(v) for f, v in self.factors.items() if isinstance(v, list)}
        given = {"D": self.D != "none", "initial_state": self.initial_state, "dt_bias": self.dt_bias}
        values = {name: v for name, v in values.items() if given.get(name, True)}
        return {n: v.to(dtype if n in TOKENWISE else v.dtype).requires_grad_() for n, v in values.items()}

    def size_of_sum(self, leaf: str) -> float:
        """What the terms that a gradient sums over tokens, channels and states come to if they do not cancel.

        0 for leaves whose gradient is no such sum.
        """
        if leaf not in ("A", "dt_bias", *FACTORS):
            return 0.0
        exponent = 50.0 if self.regime == "mixed" and leaf != "A" else 1.0
        return 0.3 * exponent * math.sqrt(self.batch * self.length * self.headdim * self.d_state)

    def starts(self) -> Tensor | None:
        """document_starts (B, T) bool, or None."""
        if self.documents is None:
            return None
        starts = torch.zeros(self.batch, self.length, dtype=torch.bool)
        for row, positions in enumerate(self.documents):
            starts[row, list(positions)] = True
        return starts

    def scan(self, leaves: Leaves, tokens: slice = slice(None), **changes: Any) -> tuple[Tensor, Tensor]:
        """`ssd_scan` of some of the tokens; `changes` replace arguments."""
        starts = self.starts()
        factors = {name: leaves.get(name, value) for name, value in self.factors.items()}
        arguments: dict[str, Any] = {
            **{name: leaf[:, tokens] if name in TOKENWISE else leaf for name, leaf in leaves.items()},
            "document_starts": None if starts is None else starts[:, tokens],
            "dt_softplus": self.dt_softplus,
            "dt_limit": self.dt_limit,
            "mitigation": Mitigation(name="test", **factors) if factors else None,  # type: ignore[arg-type]
            "chunk_size": self.chunk_size,
        }
        return ssd_scan(**{k: v for k, v in arguments.items() if k not in FACTORS} | changes)


@pytest.fixture(scope="session")
def scan_case() -> type[ScanCase]:
    return ScanCase


@st.composite
def draw_scan_case(
    draw: Any, max_length: int = 200, batch: int | None = None, factors: bool = True
) -> ScanCase:
    groups = draw(st.integers(1, 3))
    batch, heads = batch or draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    length = draw(st.one_of(st.integers(1, 40), st.integers(1, max_length)))
    chunk_size = draw(st.sampled_from([16, 32, 64, 256]))
    documents = None
    if draw(st.booleans()):
        borders = st.sampled_from(range(0, length, chunk_size))  # 0 among them
        anywhere = st.integers(0, length - 1)
        pairs = anywhere.flatmap(lambda t: st.sampled_from([t, min(t + 1, length - 1)]))
        rows = [draw(st.frozensets(st.one_of(borders, anywhere, pairs), max_size=6)) for _ in range(batch)]
        documents = tuple(rows)
    return ScanCase(
        batch=batch,
        length=length,
        heads=heads,
        headdim=draw(st.integers(1, 9)),
        groups=groups,
        d_state=draw(st.integers(1, 17)),
        chunk_size=chunk_size,
        regime=draw(st.sampled_from(["ordinary", "slow", "fast", "mixed"])),
        D=draw(st.sampled_from(["none", "head", "channel"])),
        initial_state=draw(st.booleans()),
        dt_bias=draw(st.booleans()),
        dt_softplus=draw(st.booleans()),
        dt_limit=draw(st.sampled_from([None, (0.0, math.inf), (0.01, math.inf), (0.0, 0.9), (0.02, 0.5)])),
        documents=documents,
        factors=draw(draw_factors(heads)) if factors else {},
        seed=draw(st.integers(0, 2**31)),
    )


def draw_factors(heads: int) -> st.SearchStrategy[dict[str, float | list[float]]]:
    """None, one or several factors, each a float or one value per head."""
    values = {
        "alpha_scale": st.sampled_from([0.5, 0.9, 0.999, 0.9999, 1.0]),
        "insert_scale": st.sampled_from([0.3, 0.75, 1.0]),
        "delta_scale": st.sampled_from([0.5, 0.9, 1.3]),
        "decay_scale": st.sampled_from([0.5, 1.2, 3.0]),
    }
    either = {f: st.one_of(v, st.lists(v, min_size=heads, max_size=heads)) for f, v in values.items()}
    return st.one_of(st.just({}), st.fixed_dictionaries({}, optional=either))


@pytest.fixture(scope="session")
def small_scan() -> Callable[..., Any]:
    """`small_scan(**changes)`: `ssd_scan` of one row of 5 tokens, 4 heads; `rows` makes it several."""

    def scan(rows: int = 1, **changes: Any) -> Any:
        x, dt, A = torch.zeros(rows, 5, 4, 3), torch.ones(rows, 5, 4), -torch.ones(4)
        B, C = torch.zeros(rows, 5, 2, 6), torch.zeros(rows, 5, 2, 6)
        return ssd_scan(**{"x": x, "dt": dt, "A": A, "B": B, "C": C} | changes)

    return scan


@pytest.fixture(scope="session")
def scan_cases() -> Callable[..., st.SearchStrategy[ScanCase]]:
    """`data.draw(scan_cases(max_length=...))`."""
    return draw_scan_case


@pytest.fixture(scope="session")
def gradients() -> Callable[..., Leaves]:
    """`gradients(outputs, leaves, like=None)`: of every leaf, for random cotangents.

    The cotangents are the same for every dtype; `like` rounds them to the dtypes of other outputs first.
    """

    def compute(
        outputs: tuple[Tensor, ...], leaves: Leaves, like: tuple[Tensor, ...] | None = None
    ) -> Leaves:
        generator = torch.Generator().manual_seed(1)
        cotangents = [
            torch.randn(o.shape, generator=generator).to(rounded.dtype).to(o.dtype)
            for o, rounded in zip(outputs, like or outputs, strict=True)
        ]
        grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        return {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}

    return compute


@pytest.fixture(scope="session")
def check_scan(check_close: Callable[..., None]) -> Callable[..., None]:
    """`check_scan(case, actual, expected, tolerance)`: two `(y, state, {name: gradient})` of one case."""

    def check(case: ScanCase, actual: tuple, expected: tuple, tolerance: float) -> None:
        for name, a, e in zip(("y", "state"), actual, expected, strict=False):
            check_close(a, e, tolerance, name, floor=1e-2)
        for name, a in actual[2].items():
            floor = case.size_of_sum(name.removeprefix("gradient of ")) or 1e-2
            check_close(a, expected[2][name], tolerance, name, floor=floor)

    return check

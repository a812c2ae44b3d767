"""Does it compute the operator? On few tokens and heads, against the float64 oracle, before it is timed."""

import copy
import functools

import torch
from torch import Tensor, nn

from kernels.benchmarks.inputs import Inputs, cotangent, leaves
from kernels.benchmarks.ops import Differentiated, Op, Run
from kernels.benchmarks.rivals import Contender
from kernels.benchmarks.shapes import Shape

TOLERANCE = 3e-2  # relative L2 error; bf16 products and outputs leave 1e-3 to 1e-2


def error(op: Op, contender: Contender, shape: Shape, device: str = "cuda") -> float | None:
    """The worst relative L2 error of outputs and gradients; None for a contender of another function.

    Raises ArithmeticError where it exceeds the tolerance, naming the tensor.
    """
    if contender.finish is None:
        return None
    small = shape.small()
    given, dy = _given(op, small, device)
    expected = _expected(op, small, device)
    prepared = contender.prepare(given)
    actual = _results(op, contender.run, prepared, dy)
    outputs = [actual.pop(name) for name in list(actual) if name.startswith("output")]
    finished = contender.finish(tuple(outputs), given)
    actual |= {f"output {i}": output for i, output in enumerate(finished)}
    worst = 0.0
    for name in expected.keys() & actual.keys():
        relative = ((actual[name].double() - expected[name]).norm() / expected[name].norm()).item()
        if not relative <= TOLERANCE:  # NaN neither
            raise ArithmeticError(
                f"wrong result: {name} differs from the oracle by {relative:.2g} at {small}"
            )
        worst = max(worst, relative)
    return worst


def _given(op: Op, shape: Shape, device: str) -> tuple[Inputs, Tensor]:
    """The same inputs, and gradient of the first output, every time."""
    with torch.random.fork_rng(devices=[0] if device == "cuda" else []):
        torch.manual_seed(1)
        given = op.inputs(shape, device)
        return given, cotangent(given)


def _results(op: Op, run: Run, given: Inputs, dy: Tensor) -> dict[str, Tensor]:
    """Outputs, and gradients by the names of the leaves."""
    call = op.call(run)
    prepared = call.prepared(given, dy)
    names: list[str] = []
    if isinstance(call, Differentiated):
        names = [f"gradient of {name}" for name in leaves(prepared)]
    results = call(prepared)
    count = len(results) - len(names)
    return dict(zip([*(f"output {i}" for i in range(count)), *names], results, strict=True))


@functools.lru_cache(maxsize=8)
def _expected(op: Op, shape: Shape, device: str) -> dict[str, Tensor]:
    given, dy = _given(op, shape, device)
    exact = {name: _double(value) for name, value in given.items()}
    return _results(op, op.oracle, exact, dy.double())


def _double(value: Tensor | nn.Module) -> Tensor | nn.Module:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return copy.deepcopy(value).double()

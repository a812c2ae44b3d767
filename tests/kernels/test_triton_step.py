"""What is the Triton step's own: tiles, views, the operator, slow heads, real sizes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import tuning
from kernels.ssd import Mitigation
from kernels.ssd.step import ssd_step
from kernels.ssd.triton_step import CONFIGS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


def make(
    batch: int, heads: int, headdim: int, d_state: int, groups: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    values = {
        "state": torch.randn(batch, heads, headdim, d_state),
        "x": torch.randn(batch, heads, headdim).to(dtype),
        "dt": torch.rand(batch, heads),
        "A": -torch.rand(heads) - 0.1,
        "B": torch.randn(batch, groups, d_state).to(dtype),
        "C": torch.randn(batch, groups, d_state).to(dtype),
        "D": torch.randn(heads),
    }
    return {name: value.to(DEVICE) for name, value in values.items()}


def copied(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in arguments.items()}


def check_against_torch(arguments: dict[str, Tensor], check_close: Any, tolerance: float = TOLERANCE) -> None:
    ours, theirs = copied(arguments), copied(arguments)
    y, expected = ssd_step(**ours, backend="triton"), ssd_step(**theirs, backend="torch")
    check_close(y, expected, tolerance, "y")
    check_close(ours["state"], theirs["state"], TOLERANCE, "state")


@pytest.mark.parametrize("index", range(tuning.MOST_CONFIGS))
@pytest.mark.parametrize(("headdim", "d_state"), [(3, 3000), (33, 70), (1, 1)])
def test_every_config_and_size_of_tile(headdim: int, d_state: int, index: int, check_close: Any) -> None:
    """A row of the state larger than a tile, several tiles a head, a single number."""
    assert len(CONFIGS) == tuning.MOST_CONFIGS
    with tuning.forced("ssd_step", index):
        check_against_torch(make(2, 2, headdim, d_state), check_close)


def test_views_are_read_where_they_lie(check_close: Any) -> None:
    """x, B and C as slices of the convolution's output, dt of in_proj's, the state of all layers'."""
    arguments = make(3, 4, 5, 6, groups=2)
    convolved, projected = torch.randn(3, 44, device=DEVICE), torch.rand(3, 9, device=DEVICE)
    states = torch.randn(3, 2, 4, 5, 6, device=DEVICE)
    views = arguments | {
        "state": states[:, 1],
        "x": convolved[:, :20].unflatten(1, (4, 5)),
        "B": convolved[:, 20:32].unflatten(1, (2, 6)),
        "C": convolved[:, 32:].unflatten(1, (2, 6)),
        "dt": projected[:, 5:],
    }
    packed = {name: value.contiguous().clone() for name, value in views.items()}
    untouched = states[:, 0].clone()
    assert torch.equal(ssd_step(**views, backend="triton"), ssd_step(**packed, backend="triton"))
    assert torch.equal(states[:, 1], packed["state"])
    assert torch.equal(states[:, 0], untouched)


def test_slow_heads_do_not_drift() -> None:
    """50 tokens of log decay -1e-7, which fp32 rounds to -1.2e-7 when it is an exponential near 1."""
    arguments = make(1, 1, 32, 64)
    arguments |= {"dt": torch.ones(1, 1, device=DEVICE), "A": torch.full((1,), -1e-7, device=DEVICE)}
    arguments["B"].zero_()
    before = arguments["state"].double()
    for _ in range(50):
        ssd_step(**arguments, backend="triton")
    lost = (arguments["state"].double() - before).mul(before).sum() / before.square().sum()
    assert abs(lost / -5e-6 - 1) < 0.05


def test_operator_is_well_formed() -> None:
    """Schemas, mutation, fake kernel, and tracing with dynamic shapes."""
    a = make(2, 4, 5, 6, groups=2)
    tokens = (a["state"], a["x"], a["dt"], a["A"], a["B"], a["C"])
    alpha = torch.full((4,), 0.9, device=DEVICE)
    active = torch.tensor([True, False], device=DEVICE)
    for rest in (
        (a["D"], alpha, True, [0.0, 0.5], [alpha], [float("nan"), 0.5, 1.0, 1.0, 0.0], active),
        (None, None, False, [], [], [1.0, 1.0, 1.0, 1.0, 0.3], None),
    ):
        torch.library.opcheck(torch.ops.longstate.ssd_step.default, (*tokens, *rest))


def test_compiles_without_graph_breaks() -> None:
    arguments = make(2, 4, 5, 6)
    ours, theirs = copied(arguments), copied(arguments)
    mitigation = Mitigation("forget_more", 0.9, 0.5)

    def step(arguments: dict[str, Tensor]) -> Tensor:
        return ssd_step(**arguments, mitigation=mitigation, backend="triton") * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ours), step(theirs))
    assert torch.equal(ours["state"], theirs["state"])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("index", range(tuning.MOST_CONFIGS))
@pytest.mark.parametrize(("batch", "heads", "headdim", "d_state"), [(1, 32, 64, 128), (130, 80, 64, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_sizes(
    batch: int, heads: int, headdim: int, d_state: int, dtype: torch.dtype, index: int, check_close: Any
) -> None:
    with tuning.forced("ssd_step", index):
        tolerance = TOLERANCE if dtype == torch.float32 else 2.0**-7
        check_against_torch(make(batch, heads, headdim, d_state, dtype=dtype), check_close, tolerance)


@pytest.mark.gpu
@needs_gpu
def test_a_state_beyond_32_bits() -> None:
    """8,400 sequences of 262,144 numbers: the last rows equal the same rows alone."""
    arguments = make(8400, 32, 64, 128) if torch.cuda.mem_get_info()[0] > 30 * 2**30 else None
    if arguments is None:
        pytest.skip("needs 30 GiB of free GPU memory")
    last = {n: v if n in ("A", "D") else v[-2:].clone() for n, v in arguments.items()}
    y, expected = ssd_step(**arguments), ssd_step(**last)
    assert torch.equal(y[-2:], expected)
    assert torch.equal(arguments["state"][-2:], last["state"])

"""Shared by every room: fixed seeds, one thread, reproducible hypothesis, comparison of tensors."""

import os
from collections.abc import Callable

# Before torch: tests run side by side, a thread each, and so do the processes that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
from torch import Tensor

# Triton decides when its kernels are decorated, at import, whether they run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No deadline: the first example pays for lazy initialisation. No database: runs leave nothing behind.
hypothesis.settings.register_profile(
    "longstate", derandomize=True, deadline=None, database=None, print_blob=True, max_examples=50
)
hypothesis.settings.load_profile("longstate")


WHOLE_COMMANDS = (
    "test_readme",
    "test_smoke_sweep",
    "test_given_checkpoints",
    "test_interruption",
    "test_resume",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that workers run out of tests together."""
    items.sort(key=lambda item: item.path.stem not in WHOLE_COMMANDS)


@pytest.fixture(autouse=True)
def fixed_seed_and_threads() -> None:
    """Every test starts from the same random state, on one thread (faster for small tensors)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


CheckClose = Callable[..., None]


@pytest.fixture(scope="session")
def check_close() -> CheckClose:
    """`check_close(actual, expected, tolerance, name, floor=0.0)`: relative L2 and relative maximum error."""
    return assert_close


def assert_close(
    actual: Tensor, expected: Tensor, tolerance: float, name: str = "value", floor: float = 0.0
) -> None:
    """Both ||a - e|| <= tolerance * max(||e||, floor) in L2 and the same in the maximum norm.

    `floor` is the magnitude of the terms that cancel in a quantity whose true value may be zero.
    """
    assert actual.shape == expected.shape, (
        f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    if actual.numel() == 0:  # it has no maximum
        return
    assert actual.isfinite().all(), f"{name}: not finite"
    actual, expected = actual.detach().double(), expected.detach().double()
    for norm in (2.0, float("inf")):
        error = torch.linalg.vector_norm(actual - expected, norm).item()
        scale = max(torch.linalg.vector_norm(expected, norm).item(), floor)
        assert error <= tolerance * scale, (
            f"{name}: norm {norm} error {error:.3g} of {scale:.3g} > {tolerance:.0e}"
        )

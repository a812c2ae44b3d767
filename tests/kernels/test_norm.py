"""The gated norm against its oracle."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.norm import gated_rms_norm, naive_gated_rms_norm, rms_norm


@st.composite
def draw_case(draw: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sizes, and options of the norm."""
    groups = draw(st.integers(1, 4))
    leading = draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))
    sizes = {
        "shape": (*leading, groups * draw(st.integers(4, 12))),
        "size_of_x": draw(st.sampled_from([1e-4, 1.0, 1e4])),
        "seed": draw(st.integers(0, 2**31)),
    }
    options = {
        "n_groups": groups,
        "norm_before_gate": draw(st.booleans()),
        "eps": draw(st.sampled_from([1e-5, 1e-2])),
    }
    return sizes, options


def make(sizes: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sizes["seed"])
    shapes = {"x": sizes["shape"], "z": sizes["shape"], "weight": sizes["shape"][-1:]}
    leaves = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    leaves["x"] *= sizes["size_of_x"]
    return {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}


def as_double(leaves: dict[str, Any]) -> dict[str, Any]:
    return {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}


@settings(max_examples=100)
@given(case=draw_case())
def test_equals_the_oracle(case: tuple[dict, dict], gradients: Any, check_close: Any) -> None:
    """Tiny and large inputs alike: 1e-5 in output and gradients. The gradient of x shrinks as x grows."""
    sizes, options = case
    leaves = make(sizes)
    double = as_double(leaves)
    ours, oracle = gated_rms_norm(**leaves, **options), naive_gated_rms_norm(**double, **options)
    check_close(ours, oracle, 1e-5, "y")
    expected = gradients((oracle,), double)
    for name, actual in gradients((ours,), leaves).items():
        natural = math.sqrt(actual.numel()) / (sizes["size_of_x"] if name == "gradient of x" else 1.0)
        check_close(actual, expected[name], 1e-5, name, floor=0.3 * natural)


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_a_large_slice_of_a_projection_equals_the_oracle(
    norm_before_gate: bool, gradients: Any, check_close: Any
) -> None:
    """Far more than fits a cache, and z a view of in_proj's output, the way a layer calls it."""
    leaves = {
        "x": torch.randn(3, 700, 256),
        "projected": torch.randn(3, 700, 300),
        "weight": torch.randn(256),
    }
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    double = as_double(leaves)
    options: dict[str, Any] = {"eps": 1e-5, "n_groups": 2, "norm_before_gate": norm_before_gate}
    ours = gated_rms_norm(leaves["x"], leaves["projected"][..., :256], leaves["weight"], **options)
    oracle = naive_gated_rms_norm(double["x"], double["projected"][..., :256], double["weight"], **options)
    check_close(ours, oracle, 1e-5, "y")
    expected = gradients((oracle,), double)
    for name, actual in gradients((ours,), leaves).items():
        check_close(actual, expected[name], 1e-5, name)


@settings(max_examples=30)
@given(case=draw_case())
def test_bf16_is_computed_in_fp32(case: tuple[dict, dict], gradients: Any, check_close: Any) -> None:
    """Only the results are rounded to bf16: within 2^-8 of the oracle of the same values."""
    sizes, options = case
    leaves = make(sizes, torch.bfloat16)
    double = as_double(leaves)
    ours, oracle = gated_rms_norm(**leaves, **options), naive_gated_rms_norm(**double, **options)
    assert ours.dtype == torch.bfloat16
    check_close(ours, oracle, 4e-3, "y")
    expected = gradients((oracle,), double, like=(ours,))
    for name, actual in gradients((ours,), leaves).items():
        assert actual.dtype == torch.bfloat16
        natural = math.sqrt(actual.numel()) / (sizes["size_of_x"] if name == "gradient of x" else 1.0)
        check_close(actual, expected[name], 1e-2, name, floor=0.3 * natural)


@pytest.mark.parametrize("gated", [False, True])
def test_a_transposed_input_equals_a_contiguous_one(gated: bool, gradients: Any) -> None:
    """In value and gradients: dense, but its tokens cannot be flattened into a view."""
    x, z, weight = torch.randn(5, 3, 8), torch.randn(3, 5, 8), torch.randn(8)

    def run(contiguous: bool) -> tuple[Tensor, ...]:
        leaf = x.clone().requires_grad_()
        seen = leaf.transpose(0, 1).contiguous() if contiguous else leaf.transpose(0, 1)
        y = gated_rms_norm(seen, z, weight, eps=1e-5) if gated else rms_norm(seen, weight, eps=1e-5)
        return y, gradients((y,), {"x": leaf})["gradient of x"]

    for transposed, packed in zip(run(False), run(True), strict=True):
        assert torch.equal(transposed, packed)


def test_groups_are_normalised_apart(check_close: Any) -> None:
    x, z = torch.randn(3, 12), torch.randn(3, 12)
    weight = torch.randn(12)
    together = gated_rms_norm(x, z, weight, eps=1e-5, n_groups=3)
    apart = [
        gated_rms_norm(x[:, i : i + 4], z[:, i : i + 4], weight[i : i + 4], eps=1e-5) for i in range(0, 12, 4)
    ]
    check_close(together, torch.cat(apart, dim=1), 1e-6)


def test_rows_do_not_mix() -> None:
    x, z, weight = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(8)
    y = gated_rms_norm(x, z, weight, eps=1e-5, n_groups=2)
    x[1, 3, 0] += 1.0
    changed = gated_rms_norm(x, z, weight, eps=1e-5, n_groups=2) != y
    assert changed.nonzero().tolist() == [[1, 3, c] for c in range(4)]


@pytest.mark.parametrize(("shape", "n_groups"), [((2, 7), 1), ((2, 8), 3)])
def test_wrong_shapes_are_named(shape: tuple[int, ...], n_groups: int) -> None:
    with pytest.raises(ValueError, match="n_groups"):
        gated_rms_norm(torch.zeros(2, 8), torch.zeros(shape), torch.zeros(8), eps=1e-5, n_groups=n_groups)

"""The causal convolution against its oracle, its state, and what may not influence what."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.conv import causal_conv1d, naive_causal_conv1d

TOLERANCE = 1e-5  # fp32 against float64; measured: 5e-7


@st.composite
def draw_case(draw: Any) -> dict[str, Any]:
    batch, length = draw(st.integers(1, 3)), draw(st.one_of(st.integers(1, 6), st.integers(1, 40)))
    return {
        "batch": batch,
        "length": length,
        "channels": draw(st.integers(1, 7)),
        "width": draw(st.integers(2, 8)),
        "bias": draw(st.booleans()),
        "state": draw(st.booleans()),
        "activation": draw(st.booleans()),
        "documents": draw(
            st.none() | st.lists(st.frozensets(st.integers(0, length - 1)), min_size=batch, max_size=batch)
        ),
        "seed": draw(st.integers(0, 2**31)),
    }


def make(case: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensor arguments that record gradients, and the other arguments."""
    generator = torch.Generator().manual_seed(case["seed"])
    shapes = {
        "x": (case["batch"], case["length"], case["channels"]),
        "weight": (case["channels"], case["width"]),
        "bias": (case["channels"],),
        "initial_state": (case["batch"], case["channels"], case["width"] - 1),
    }
    given_ = {"bias": case["bias"], "initial_state": case["state"]}
    leaves = {
        name: torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for name, shape in shapes.items()
        if given_.get(name, True)
    }
    starts = None
    if case["documents"] is not None:
        starts = torch.zeros(case["batch"], case["length"], dtype=torch.bool)
        for row, positions in enumerate(case["documents"]):
            starts[row, list(positions)] = True
    return leaves, {"document_starts": starts, "activation": case["activation"]}


def as_double(leaves: dict[str, Any]) -> dict[str, Any]:
    return {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}


@settings(max_examples=100)
@given(case=draw_case())
def test_equals_the_oracle(case: dict, gradients: Any, check_close: Any) -> None:
    leaves, options = make(case)
    double = as_double(leaves)
    ours, oracle = causal_conv1d(**leaves, **options), naive_causal_conv1d(**double, **options)
    check_close(ours[0], oracle[0], TOLERANCE, "y")
    assert torch.equal(ours[1], oracle[1].float())
    expected = gradients(oracle, double)
    for name, actual in gradients(ours, leaves).items():
        check_close(actual, expected[name], TOLERANCE, name, floor=1e-2)


@pytest.mark.parametrize(("batch", "length", "channels"), [(1, 1700, 400), (3, 600, 350), (900, 3, 200)])
def test_large_inputs_equal_the_oracle(
    batch: int, length: int, channels: int, gradients: Any, check_close: Any
) -> None:
    """Far more than fits a cache: long rows, rows that share blocks, many short rows, with documents."""
    documents = [frozenset(torch.randint(length, (5,)).tolist()) for _ in range(batch)]
    sizes = {"batch": batch, "length": length, "channels": channels, "width": 4, "seed": 0}
    case = sizes | {"bias": True, "state": True, "activation": True, "documents": documents}
    leaves, options = make(case)
    double = as_double(leaves)
    ours, oracle = causal_conv1d(**leaves, **options), naive_causal_conv1d(**double, **options)
    check_close(ours[0], oracle[0], TOLERANCE, "y")
    expected = gradients(oracle, double)
    for name, actual in gradients(ours, leaves).items():
        check_close(actual, expected[name], TOLERANCE, name)


@settings(max_examples=60)
@given(case=draw_case(), data=st.data())
def test_pieces_equal_the_whole(case: dict, data: Any, gradients: Any, check_close: Any) -> None:
    """Split anywhere, pieces shorter than the kernel included; gradients flow through the carried inputs."""
    cuts = sorted(
        data.draw(st.sets(st.integers(1, max(1, case["length"] - 1)), max_size=6)) - {case["length"]}
    )
    (one, options), (other, _) = make(case), make(case)
    starts = options.pop("document_starts")
    whole = causal_conv1d(**one, **options, document_starts=starts)
    state, outputs = other.get("initial_state"), []
    for start, stop in zip([0, *cuts], [*cuts, case["length"]], strict=True):
        y, state = causal_conv1d(
            other["x"][:, start:stop],
            other["weight"],
            other.get("bias"),
            initial_state=state,
            document_starts=None if starts is None else starts[:, start:stop],
            **options,
        )
        outputs.append(y)
    assert state is not None
    pieces = torch.cat(outputs, dim=1), state
    check_close(pieces[0], whole[0], TOLERANCE, "y")
    assert torch.equal(pieces[1], whole[1])
    expected = gradients(whole, one)
    for name, actual in gradients(pieces, other).items():
        check_close(actual, expected[name], TOLERANCE, name, floor=1e-2)


@settings(max_examples=30)
@given(case=draw_case())
def test_bf16_rounds_inputs_and_outputs_only(case: dict, gradients: Any, check_close: Any) -> None:
    """Sums run in fp32: against the oracle of the same bf16 values, one rounding to 8 bits remains, 2^-9."""
    leaves, options = make(case, torch.bfloat16)
    double = as_double(leaves)
    ours, oracle = causal_conv1d(**leaves, **options), naive_causal_conv1d(**double, **options)
    assert ours[0].dtype == ours[1].dtype == torch.bfloat16
    check_close(ours[0], oracle[0], 4e-3, "y")
    expected = gradients(oracle, double, like=ours)
    for name, actual in gradients(ours, leaves).items():
        assert actual.dtype == torch.bfloat16
        check_close(actual, expected[name], 1e-2, name, floor=2.0)


def test_is_the_layer_of_pytorch(check_close: Any) -> None:
    """Same weights, same taps as nn.Conv1d with left padding, as the public checkpoints were trained."""
    layer = torch.nn.Conv1d(6, 6, 4, groups=6, padding=3)
    x = torch.randn(2, 11, 6)
    expected = torch.nn.functional.silu(layer(x.transpose(1, 2))[..., :11]).transpose(1, 2)
    y, state = causal_conv1d(x, layer.weight.squeeze(1), layer.bias)
    check_close(y, expected, 1e-6)
    assert torch.equal(state, x[:, -3:].transpose(1, 2))


def test_a_slice_of_a_projection_equals_a_contiguous_input(gradients: Any) -> None:
    projected, weight = torch.randn(2, 9, 20), torch.randn(7, 4)

    def run(contiguous: bool) -> tuple[Tensor, ...]:
        leaf = projected.clone().requires_grad_()
        x = leaf[..., 5:12].contiguous() if contiguous else leaf[..., 5:12]
        outputs = causal_conv1d(x, weight)
        return *outputs, gradients(outputs, {"projected": leaf})["gradient of projected"]

    for strided, packed in zip(run(False), run(True), strict=True):
        assert torch.equal(strided, packed)


def test_a_token_reaches_only_the_next_tokens_of_its_document() -> None:
    """Bit for bit: W - 1 tokens ahead, no other row or channel, no document behind a start, nor the state."""
    x, weight = torch.randn(2, 30, 3), torch.randn(3, 4)
    starts = torch.zeros(2, 30, dtype=torch.bool)
    starts[0, [10, 11, 28]] = True
    y, state = causal_conv1d(x, weight, document_starts=starts)
    for token, reached in (
        (3, range(3, 7)),
        (9, range(9, 10)),
        (10, range(10, 11)),
        (11, range(11, 15)),
        (27, [27]),
    ):
        other = x.clone()
        other[0, token, 1] += 1.0
        other_y, other_state = causal_conv1d(other, weight, document_starts=starts)
        changed = (other_y != y).nonzero().tolist()
        assert changed == [[0, t, 1] for t in reached]
        assert torch.equal(other_state, state)
    assert not state[0, :, 0].any()  # token 27 belongs to the document before
    assert torch.equal(state[0, :, 1:], x[0, 28:].t())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 4)}, r"weight has shape \(4, 4\)"),
        (
            {"initial_state": torch.zeros(2, 3, 4)},
            r"initial_state has shape \(2, 3, 4\): expected \(2, 3, 3\)",
        ),
        ({"document_starts": torch.zeros(2, 6, dtype=torch.bool)}, "document_starts has shape"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 5, 3), "weight": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**arguments | change)

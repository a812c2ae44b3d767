"""Packed sequences and intermediate states, under every backend that runs here."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

TOLERANCE = 1e-4  # relative; measured: 1e-6
PACKED = torch.tensor([0, 2, 5])


def as_double(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}


def with_states(leaves: dict[str, Tensor], case: Any, rows: int) -> dict[str, Tensor]:
    """The leaves, with one initial state for each packed sequence."""
    shape = (rows, case.heads, case.headdim, case.d_state)
    state = torch.randn(shape, generator=torch.Generator().manual_seed(case.seed)).requires_grad_()
    return {**leaves, "initial_state": state}


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("backend", ["chunked", "naive"])
def test_packed_sequences_equal_separate_calls(
    backend: str, data: Any, scan_cases: Any, gradients: Any, check_scan: Any
) -> None:
    """Outputs, one final state a sequence and all gradients, documents inside the sequences included."""
    case = data.draw(scan_cases(max_length=90, batch=1))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, case.length - 1)), max_size=4)) - {case.length})
    borders = [0, *cuts, case.length]
    one, other = (with_states(case.leaves(), case, len(borders) - 1) for _ in range(2))
    packed = case.scan(one, cu_seqlens=torch.tensor(borders, dtype=torch.int32), backend=backend)
    alone = [
        case.scan(other, slice(a, b), initial_state=other["initial_state"][i : i + 1], backend=backend)
        for i, (a, b) in enumerate(itertools.pairwise(borders))
    ]
    outputs, states = zip(*alone, strict=True)
    separate = torch.cat(outputs, 1), torch.cat(states)
    check_scan(case, (*packed, gradients(packed, one)), (*separate, gradients(separate, other)), 1e-5)


@settings(max_examples=100)
@given(data=st.data())
def test_states_are_the_oracles(data: Any, scan_cases: Any, gradients: Any, check_close: Any) -> None:
    """Any k, with documents, initial states and every gradient; y and the final state stay bit for bit."""
    case = data.draw(scan_cases(max_length=120))
    every = data.draw(st.one_of(st.integers(1, 9), st.integers(1, case.length + 3)))
    ours, theirs = case.leaves(), as_double(case.leaves())
    *plain, states = case.scan(ours, states_every=every)
    *oracle, expected = case.scan(theirs, states_every=every, backend="naive")
    assert states.shape == (case.batch, case.length // every, case.heads, case.headdim, case.d_state)
    assert states.dtype == torch.float32
    for now, without in zip(plain, case.scan(ours), strict=True):
        assert torch.equal(now, without)
    if not states.numel():
        return
    check_close(states, expected, TOLERANCE, "states", floor=1e-2)
    reference = gradients((*oracle, expected), theirs)
    for name, actual in gradients((*plain, states), ours).items():
        floor = case.size_of_sum(name.removeprefix("gradient of ")) * math.sqrt(case.length) or 1e-2
        check_close(actual, reference[name], TOLERANCE, name, floor=floor)


@pytest.mark.parametrize("backend", ["chunked", "naive"])
@pytest.mark.parametrize("every", [1, 7, 16, 45, 46])
def test_states_are_the_final_states_of_pieces(
    backend: str, every: int, scan_case: Any, check_close: Any
) -> None:
    case = scan_case(length=45, initial_state=True, documents=(frozenset({7, 20}), frozenset({0, 44})))
    leaves = case.leaves()
    states = case.scan(leaves, states_every=every, backend=backend)[2]
    assert states.shape[1] == 45 // every
    for i, state in enumerate(states.unbind(1)):
        piece = case.scan(leaves, slice(0, (i + 1) * every), backend=backend)[1]
        check_close(state, piece, 1e-5, f"after {(i + 1) * every} tokens")


def test_states_of_packed_sequences_follow_each_other(scan_case: Any, check_close: Any) -> None:
    """Counted from each sequence's own first token."""
    case = scan_case(batch=1, length=30)
    leaves, borders = case.leaves(), [0, 11, 15, 30]
    states = case.scan(leaves, cu_seqlens=torch.tensor(borders), states_every=5)[2]
    separate = [case.scan(leaves, slice(a, b), states_every=5)[2] for a, b in itertools.pairwise(borders)]
    assert [s.shape[1] for s in separate] == [2, 0, 3]
    check_close(states, torch.cat(separate, 1), 1e-6)


def test_states_with_retention_near_1(scan_case: Any, check_close: Any) -> None:
    """16,384 tokens at 1 - 1e-7, a state every 64: nothing is lost by the passes over spans."""
    case = scan_case(batch=1, length=16_384, heads=2, headdim=2, groups=1, d_state=4, regime="slow")
    leaves = case.leaves()
    states, oracle = (
        case.scan(some, states_every=64, **backend)[2]
        for some, backend in ((leaves, {}), (as_double(leaves), {"backend": "naive"}))
    )
    check_close(states, oracle, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype: torch.dtype, scan_case: Any, gradients: Any, check_close: Any) -> None:
    """States and their gradients in fp32, y in the dtype of x, both to its digits."""
    case = scan_case(length=40, initial_state=True, D="head")
    ours = case.leaves(dtype)
    theirs = as_double(ours)
    results, oracle = case.scan(ours, states_every=8), case.scan(theirs, states_every=8, backend="naive")
    assert [t.dtype for t in results] == [dtype, torch.float32, torch.float32]
    for name, actual, expected in zip(("y", "state", "states"), results, oracle, strict=True):
        check_close(actual, expected, 2e-2, name)
    expected = gradients(oracle, theirs, like=results)
    for name, actual in gradients(results, ours).items():
        check_close(actual, expected[name], 4e-2, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0])}, r"cu_seqlens has shape \(1,\): expected \(S \+ 1,\)"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, "cu_seqlens has dtype float32: expected int64 or int32"),
        ({"cu_seqlens": torch.tensor([0, 4])}, r"cu_seqlens=\[0, 4\]: expected .* from 0 to T = 5"),
        ({"cu_seqlens": torch.tensor([1, 5])}, r"cu_seqlens=\[1, 5\]"),
        ({"cu_seqlens": torch.tensor([0, 3, 3, 5])}, r"cu_seqlens=\[0, 3, 3, 5\]"),
        ({"cu_seqlens": torch.tensor([0, 5]), "rows": 2}, "x has 2 rows: cu_seqlens packs"),
        ({"cu_seqlens": PACKED, "initial_state": torch.zeros(1, 4, 3, 6)}, r"\(2, 4, 3, 6\)$"),
        ({"states_every": 0}, "states_every=0: must be at least 1"),
        ({"position": torch.zeros(2, dtype=torch.int64)}, r"position has shape \(2,\): expected \(1,\)"),
        ({"position": torch.zeros(1)}, "position has dtype float32"),
        ({"document_starts": torch.zeros(1, 5, dtype=torch.int64)}, "document_starts has dtype int64"),
        ({"initial_state": torch.zeros(1, 4, 3, 6).bfloat16()}, "initial_state has dtype bfloat16"),
        ({"dt": torch.zeros(1, 5, 4, dtype=torch.int64)}, "dt has dtype int64"),
        ({"dt_bias": torch.zeros(3)}, r"dt_bias has shape \(3,\): expected \(4,\)"),
        ({"dt_limit": (0.5, 0.1)}, r"dt_limit=\(0.5, 0.1\)"),
        ({"dt_limit": (-1.0, 0.1)}, "0 <= low"),
        ({"A": torch.zeros(4, device="meta")}, "A is on meta, x on cpu"),
        ({"x": torch.zeros(1, 5, 4, 3, dtype=torch.float64)}, "x has dtype float64"),
        ({"validate": True, "dt": -torch.ones(1, 5, 4)}, "dt holds -1: expected dt >= 0"),
        ({"validate": True, "A": torch.zeros(4)}, "A holds 0: expected A < 0"),
        ({"validate": True, "x": torch.full((1, 5, 4, 3), math.nan)}, "x holds NaN or infinity"),
        ({"validate": True, "initial_state": torch.full((1, 4, 3, 6), math.inf)}, "initial_state holds NaN"),
        ({"validate": True, "position": torch.tensor([-1])}, "position holds -1"),
        ({"validate": True, "cu_seqlens": torch.tensor([0, 7])}, r"cu_seqlens=\[0, 7\]"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str, small_scan: Any) -> None:
    with pytest.raises(ValueError, match=message):
        small_scan(**change)


def test_values_are_checked_only_on_request(small_scan: Any) -> None:
    small_scan(dt=-torch.ones(1, 5, 4), dt_softplus=True, validate=True)
    small_scan(A=torch.zeros(4))

"""Mitigations of some heads, and the filter of tokens: against what they are defined to be."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.ssd import Mitigation, Window, ssd_scan

TOLERANCE = 1e-4  # relative, in L2 and in the maximum norm; measured: 1e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULES: dict[str, dict[str, Any]] = {
    "forget_more": {"alpha_scale": 0.9, "insert_scale": 0.5},
    "delta_scale": {"delta_scale": 0.7},
    "decay_scale": {"decay_scale": 2.0},
    "state_norm": {"max_norm": 1.0, "every": 5},
    "sliding_window": {"window": 6},
    "hard_reset": {"every": 6},
    "token_filter": {"threshold": 0.3},
}


def tensors_of(state: Tensor | Window) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else tuple(state)


@settings(max_examples=8)
@given(data=st.data())
@pytest.mark.parametrize("name", RULES)
def test_some_heads_follow_the_rule_and_the_others_none(
    name: str, data: Any, scan_cases: Any, gradients: Any, check_scan: Any
) -> None:
    """y, the states and every gradient are, head by head, the oracle's with the rule or without it."""
    case = data.draw(scan_cases(max_length=40, factors=False))
    heads = tuple(data.draw(st.sets(st.integers(0, case.heads - 1), min_size=1)))
    ours = case.leaves()
    if name == "sliding_window":  # begins with a window, not with a state
        ours.pop("initial_state", None)
    theirs = {n: leaf.detach().double().requires_grad_() for n, leaf in ours.items()}
    every = case.length  # states after so many tokens: the last, also where a window takes its place
    y, _, state = case.scan(ours, mitigation=Mitigation(name, **RULES[name], heads=heads), states_every=every)
    inside, outside = (
        case.scan(theirs, mitigation=rule, states_every=every, backend="naive")
        for rule in (Mitigation(name, **RULES[name]), Mitigation())
    )
    chosen = torch.tensor([head in heads for head in range(case.heads)])[:, None]
    expected = torch.where(chosen, inside[0], outside[0])
    last = torch.where(chosen[..., None], inside[2], outside[2])
    reference = (expected, last, gradients((expected, last), theirs))
    check_scan(case, (y, state, gradients((y, state), ours)), reference, TOLERANCE)


@pytest.mark.parametrize("name", RULES)
def test_pieces_of_any_length_equal_the_whole(name: str, scan_case: Any, check_close: Any) -> None:
    """Single tokens among them; heads 1, 2 and 3 of two groups of two, with values of their own."""
    case = scan_case(length=30, documents=(frozenset({13}), frozenset()), D="channel", dt_softplus=True)
    leaves = {n: leaf.detach() for n, leaf in case.leaves().items()}
    shares = torch.tensor([1.0, 0.5, 0.8, 0.3])
    each = {n: v * shares if isinstance(v, float) else v for n, v in RULES[name].items()}
    rule = Mitigation(name, **each, heads=(1, 2, 3))
    whole, last = case.scan(leaves, mitigation=rule)
    state, outputs = None, []
    counts = torch.zeros(2, dtype=torch.int64)
    for start, stop in ((0, 1), (1, 2), (2, 11), (11, 14), (14, 15), (15, 30)):
        y, state = case.scan(
            leaves, slice(start, stop), mitigation=rule, initial_state=state, position=counts
        )
        outputs.append(y)
        counts = torch.tensor([stop - 13 if stop > 13 else stop, stop])
    check_close(torch.cat(outputs, 1), whole, 1e-5, "y")
    assert state is not None
    for one, other in zip(tensors_of(state), tensors_of(last), strict=True):
        check_close(one, other, 1e-5, "state", floor=1e-2)


@pytest.mark.parametrize("name", RULES)
def test_triton_equals_the_oracle(name: str, scan_case: Any, check_close: Any) -> None:
    case = scan_case(length=21, headdim=16, d_state=16)
    leaves = {n: leaf.detach().to(DEVICE) for n, leaf in case.leaves().items()}
    rule = Mitigation(name, **RULES[name], heads=(0, 3))
    y, state = case.scan(leaves, mitigation=rule, backend="triton")
    expected, last = case.scan(leaves, mitigation=rule, backend="naive")
    check_close(y, expected, TOLERANCE, "y")
    for one, other in zip(tensors_of(state), tensors_of(last), strict=True):
        check_close(one, other, TOLERANCE, "state", floor=1e-2)


def test_all_heads_named_is_no_heads_named(scan_case: Any) -> None:
    case = scan_case(length=20)
    leaves = {n: leaf.detach() for n, leaf in case.leaves().items()}
    for name, values in RULES.items():
        y, state = case.scan(leaves, mitigation=Mitigation(name, **values, heads=(3, 1, 0, 2)))
        expected, last = case.scan(leaves, mitigation=Mitigation(name, **values))
        assert torch.equal(y, expected)
        for one, other in zip(tensors_of(state), tensors_of(last), strict=True):
            assert torch.equal(one, other)


def test_a_filtered_token_is_an_identity_update() -> None:
    """The head's state stays bit for bit; y reads it; dt has no gradient there; other heads go on."""
    x, B = torch.randn(1, 4, 2, 3), torch.randn(1, 4, 1, 5)
    C, D = torch.randn(1, 4, 1, 5), torch.randn(2)
    dt = torch.tensor([[[0.1, 0.1], [0.2, 0.2], [0.3, 0.3], [0.4, 0.4]]]).requires_grad_()
    state = torch.randn(1, 2, 3, 5)
    rule = Mitigation("token_filter", threshold=torch.tensor([0.3, 0.0]))
    options = {"D": D, "initial_state": state, "mitigation": rule, "states_every": 1}
    y, _, states = ssd_scan(x, dt, -torch.ones(2), B, C, **options)
    assert torch.equal(states[:, :2, 0], state[:, None, 0].expand(1, 2, 3, 5))
    changed = (states[:, 1:] != states[:, :-1]).flatten(3).any(3)
    assert changed[0].tolist() == [[False, True], [True, True], [True, True]]  # a dt at the threshold passes
    read = torch.einsum("bhpn,btn->bthp", state, C[:, :, 0]) + D[:, None] * x
    torch.testing.assert_close(y[:, :2, 0], read[:, :2, 0])
    (gradient,) = torch.autograd.grad(y.sum() + states.sum(), dt)
    assert (gradient != 0)[0].tolist() == [[False, True], [False, True], [True, True], [True, True]]


def test_the_filter_is_a_scan_of_what_passes(scan_case: Any) -> None:
    """After bias, softplus and limits: dt set to zero by hand gives the same y, bit for bit."""
    case = scan_case(length=50, dt_softplus=True, dt_bias=True, dt_limit=(0.02, 0.5))
    leaves = {n: leaf.detach() for n, leaf in case.leaves().items()}
    rule = Mitigation("token_filter", threshold=0.2)
    dt = torch.nn.functional.softplus(leaves["dt"] + leaves["dt_bias"], threshold=50.0).clamp(0.02, 0.5)
    kept = dt.where(dt >= 0.2, 0.0)
    assert 0.2 < (kept > 0).float().mean() < 0.8
    plain = {n: leaf for n, leaf in leaves.items() if n != "dt_bias"} | {"dt": kept}
    y = case.scan(leaves, mitigation=rule)[0]
    assert torch.equal(y, case.scan(plain, dt_softplus=False, dt_limit=None)[0])

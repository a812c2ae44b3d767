"""The scan in pieces, in other chunk sizes, and what may not influence what."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

TOLERANCE = 1e-4  # fp32 against fp32 in another order of summation


def scan_pieces(
    case: Any, leaves: dict[str, Tensor], cuts: list[int], **changes: Any
) -> tuple[Tensor, Tensor]:
    """Scan [0, cuts[0]), [cuts[0], cuts[1]), ..., each piece continuing from the state of the one before."""
    outputs, state = [], leaves.get("initial_state")
    for start, stop in zip([0, *cuts], [*cuts, case.length], strict=True):
        y, state = case.scan(leaves, slice(start, stop), initial_state=state, **changes)
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, dim=1), state


@given(data=st.data())
def test_chunk_size_changes_no_result(data: Any, scan_cases: Any, gradients: Any, check_scan: Any) -> None:
    case = data.draw(scan_cases())
    other_size = data.draw(st.sampled_from([16, 32, 64, 128, 256]))
    one, other = case.leaves(), case.leaves()
    first, second = case.scan(one), case.scan(other, chunk_size=other_size)
    check_scan(case, (*second, gradients(second, other)), (*first, gradients(first, one)), TOLERANCE)


@given(data=st.data())
def test_pieces_equal_the_whole(data: Any, scan_cases: Any, gradients: Any, check_scan: Any) -> None:
    """Split anywhere, even into single tokens; gradients flow through every carried state."""
    case = data.draw(scan_cases(max_length=130))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, case.length - 1)), max_size=5)))
    cuts = [cut for cut in cuts if cut < case.length]
    one, other = case.leaves(), case.leaves()
    whole, pieces = case.scan(one), scan_pieces(case, other, cuts)
    check_scan(case, (*pieces, gradients(pieces, other)), (*whole, gradients(whole, one)), TOLERANCE)


@pytest.mark.parametrize(
    "documents", [None, (frozenset({0, 7, 8, 31}), frozenset({16}))], ids=["one", "documents"]
)
@pytest.mark.parametrize(
    "factors",
    [
        {},
        {"alpha_scale": 0.99, "insert_scale": [0.5, 0.6, 0.7, 1.0]},
        {"alpha_scale": [0.9, 1.0, 0.999, 0.9999]},
        {"delta_scale": 0.8},
        {"decay_scale": [0.5, 1.5, 1.0, 2.0]},
    ],
    ids=["none", "forget_more", "forget_more_per_head", "delta_scale", "decay_scale"],
)
def test_single_tokens_equal_the_whole(
    factors: dict, documents: Any, scan_case: Any, gradients: Any, check_scan: Any
) -> None:
    case = scan_case(
        length=45,
        factors=factors,
        documents=documents,
        D="channel",
        initial_state=True,
        dt_softplus=True,
        dt_bias=True,
    )
    one, other = case.leaves(), case.leaves()
    whole, steps = case.scan(one), scan_pieces(case, other, list(range(1, case.length)))
    check_scan(case, (*steps, gradients(steps, other)), (*whole, gradients(whole, one)), TOLERANCE)


def test_documents_equal_separate_scans(scan_case: Any, check_close: Any) -> None:
    """A packed row gives what each document gives alone, from a zero state."""
    borders = [0, 1, 16, 17, 50, 70]
    case = scan_case(batch=1, length=70, documents=(frozenset(borders[:-1]),), D="head")
    leaves = case.leaves()
    y, state = case.scan(leaves)
    alone = [
        case.scan(leaves, slice(start, stop), document_starts=None)
        for start, stop in itertools.pairwise(borders)
    ]
    check_close(y, torch.cat([piece for piece, _ in alone], dim=1), 1e-5, "y")
    check_close(state, alone[-1][1], 1e-5, "state")


def influence(case: Any, of: str, row: int, token: int) -> tuple[Tensor, Tensor]:
    """How much each token's output (B, T) and each row's final state (B,) change with one token's input.

    Relative to the largest output and state.
    """
    leaves = case.leaves()
    y, state = case.scan(leaves)
    with torch.no_grad():
        leaves[of][row, token] += 1.0
    other_y, other_state = case.scan(leaves)
    outputs = (other_y - y).abs().flatten(2).amax(2) / y.abs().max()
    return outputs, (other_state - state).abs().flatten(1).amax(1) / state.abs().max()


@pytest.mark.parametrize("of", ["x", "dt", "B", "C"])
def test_a_token_reaches_only_later_tokens_of_its_document(of: str, scan_case: Any) -> None:
    """Bit for bit: nothing earlier, no other row, no other document, no state beyond a document's end.

    Of dt, other documents of the chunk share the rounding of a sum: 1e-6.
    """
    case = scan_case(length=90, chunk_size=32, documents=(frozenset({20, 40, 64}), frozenset({5})))
    nothing = 1e-6 if of == "dt" else 0.0
    for token, end in ((3, 20), (20, 40), (39, 40), (50, 64), (64, 90), (89, 90)):
        outputs, states = influence(case, of, 0, token)
        assert not outputs[1].any()
        assert not states[1]
        assert not outputs[0, :token].any()
        assert (outputs[0, end:] <= nothing).all()
        reached = outputs[0, token:end] > 1e-6
        assert reached[0]
        assert reached[1:].any() == (of != "C" and token + 1 < end)
        if end == 90 and of != "C":
            assert states[0] > 1e-6
        else:
            assert states[0] <= nothing


def test_gradients_stay_inside_a_document_and_a_row(scan_case: Any) -> None:
    """The loss of one document has zero gradient at every token of another, of dt up to its rounding."""
    case = scan_case(
        length=90, chunk_size=32, documents=(frozenset({20, 40, 64}), frozenset({5})), initial_state=True
    )
    leaves = case.leaves()
    y, _ = case.scan(leaves)
    names = ["x", "dt", "B", "C", "initial_state"]
    *tokenwise, initial = torch.autograd.grad(y[0, 40:64].square().sum(), [leaves[n] for n in names])
    assert not initial.any()
    for name, grad in zip(names, tokenwise, strict=False):
        size = grad.flatten(2).norm(dim=2)
        assert (size[0, 40:64] > 0).all(), name
        outside = torch.cat([size[0, :40], size[0, 64:], size[1]])
        assert outside.max() <= (1e-6 * size.max() if name == "dt" else 0), name


def test_a_token_without_a_step_changes_nothing(scan_case: Any, gradients: Any, check_scan: Any) -> None:
    """dt = 0 keeps the state and inserts nothing, yet the gradient of that dt is what the oracle says."""
    case = scan_case(length=40, initial_state=True, D="head")
    leaves, double = case.leaves(), case.leaves()
    with torch.no_grad():
        for some in (leaves, double):
            some["dt"][:, 10:30] = 0
    before, after = case.scan(leaves, slice(0, 10))[1], case.scan(leaves, slice(0, 30))[1]
    assert torch.equal(before, after)
    double = {name: leaf.detach().double().requires_grad_() for name, leaf in double.items()}
    ours, oracle = case.scan(leaves), case.scan(double, backend="naive")
    check_scan(case, (*ours, gradients(ours, leaves)), (*oracle, gradients(oracle, double)), TOLERANCE)


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
@pytest.mark.parametrize(
    "decay", [0.3, 1.0, 3.0, 50.0, None], ids=lambda d: f"decay_{d}" if d else "document"
)
def test_a_forgotten_state_leaves_what_it_should(
    decay: float | None, size: float, scan_case: Any, check_close: Any
) -> None:
    """A state grown past all bounds decays by exp(-0.3 .. -50) a token, or ends at a document start.

    Nothing else is inserted: what is left is the state times its retention, 1e-5 relative, or exactly zero.
    """
    documents = None if decay else (frozenset({9}),)
    case = scan_case(batch=1, length=32, chunk_size=16, documents=documents, initial_state=True)
    leaves = {name: leaf.detach() for name, leaf in case.leaves().items()}
    leaves["initial_state"] *= size
    leaves["x"].zero_()
    leaves["A"].fill_(-1.0)
    leaves["dt"].fill_(decay or 0.01)
    for stop in (16, 32):
        y, state = case.scan(leaves, slice(0, stop))
        oracle = case.scan({n: t.double() for n, t in leaves.items()}, slice(0, stop), backend="naive")
        check_close(y, oracle[0], 1e-5, "y")
        # below the smallest fp32 number nothing can be left
        check_close(state, oracle[1], 1e-5, "state", floor=1e-25 * size if decay else 0.0)


@pytest.mark.parametrize("size", [1e3, 1e6])
@pytest.mark.parametrize("how", ["document", "decay"])
def test_a_reset_forgets_a_huge_state(how: str, size: float, scan_case: Any, check_close: Any) -> None:
    """What follows is as precise as after a small state, be it a document start or a decay of exp(-50)."""
    regime, starts = ("ordinary", frozenset({9})) if how == "document" else ("fast", frozenset())
    case = scan_case(
        batch=1, length=32, chunk_size=16, regime=regime, documents=(starts,), initial_state=True
    )
    leaves = {name: leaf.detach() for name, leaf in case.leaves().items()}
    leaves["initial_state"] *= size
    for stop in (16, 32):
        y, state = case.scan(leaves, slice(0, stop))
        oracle = case.scan({n: t.double() for n, t in leaves.items()}, slice(0, stop), backend="naive")
        check_close(y[:, 9:], oracle[0][:, 9:], 1e-5, "y")
        check_close(state, oracle[1], 1e-5, "state")


def test_gradients_are_causal(scan_case: Any) -> None:
    """The loss of the first tokens has exactly zero gradient at every later token."""
    case = scan_case(length=90, chunk_size=32)
    leaves = case.leaves()
    y, _ = case.scan(leaves)
    names = ["x", "dt", "B", "C"]
    for name, grad in zip(
        names, torch.autograd.grad(y[:, :41].sum(), [leaves[n] for n in names]), strict=True
    ):
        assert not grad[:, 41:].any(), name
        assert grad[:, :41].flatten(2).any(2).all(), name

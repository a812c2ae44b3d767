"""Mitigations that are more than factors: against the oracle, against their definitions, in pieces."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.ssd import Mitigation, Window, map_state, zero_state

TOLERANCE = 1e-4  # relative, in L2 and in the maximum norm; measured: 1e-6
Leaves = dict[str, Tensor]
Settings = dict[str, Any]

OPERATORS: dict[str, Settings] = {
    "norm": {"name": "state_norm", "max_norm": 1.5, "every": 6},
    "norm_each_token": {"name": "state_norm", "max_norm": [0.8, 1.5, math.inf, 3.0], "every": 1},
    "window": {"name": "sliding_window", "window": 9},
    "window_of_1": {"name": "sliding_window", "window": 1},
    "window_longer_than_all": {"name": "sliding_window", "window": 60},
    "window_of_one_head_a_group": {"name": "sliding_window", "window": 9, "heads": (3, 0)},
    "reset": {"name": "hard_reset", "every": 7},
    "reset_of_three_heads": {"name": "hard_reset", "every": 7, "heads": (0, 2, 3)},
    "filter": {"name": "token_filter", "threshold": [0.1, 0.0, 0.4, 2.0]},
}


def draw_operator(heads: int, length: int) -> st.SearchStrategy[Settings]:
    tokens = st.one_of(st.integers(1, 9), st.integers(1, length + 5))
    norms = st.sampled_from([0.3, 1.0, 4.0, math.inf])
    dts = st.sampled_from([0.0, 0.03, 0.3, 0.8])
    some = st.sets(st.integers(0, heads - 1), min_size=1).map(tuple)

    def of(name: str, **values: st.SearchStrategy) -> st.SearchStrategy[Settings]:
        return st.fixed_dictionaries({"name": st.just(name), **values}, optional={"heads": some})

    def one_or_each(values: st.SearchStrategy) -> st.SearchStrategy:
        return st.one_of(values, st.lists(values, min_size=heads, max_size=heads))

    return st.one_of(
        of("state_norm", max_norm=one_or_each(norms), every=tokens),
        of("sliding_window", window=tokens),
        of("hard_reset", every=tokens),
        of("token_filter", threshold=one_or_each(dts)),
    )


def make_leaves(case: Any, operator: Settings) -> Leaves:
    """The case's leaves and the operator's: a max_norm per head, a window if the case starts from a state.

    Every third token of the window is one that inserts nothing, as before a document's start.
    """
    leaves: Leaves = case.leaves()
    if isinstance(operator.get("max_norm"), list):
        leaves["max_norm"] = torch.tensor(operator["max_norm"]).requires_grad_()
    past = operator.get("window", 1) - 1
    if "initial_state" in leaves and "window" in operator:
        del leaves["initial_state"]
    if case.initial_state and past:
        window = no_past(case, operator)
        for tensor in window:
            tensor.normal_(generator=torch.Generator().manual_seed(case.seed))
        window.log_decay.abs_().neg_()
        window.insert.abs_()[:, ::3] = 0
        leaves |= {f"past.{n}": t.requires_grad_() for n, t in window._asdict().items() if t.numel()}
    return leaves


def no_past(case: Any, operator: Settings) -> Window:
    sizes = (case.batch, case.heads, case.headdim, case.groups, case.d_state)
    window = zero_state(Mitigation(**operator), *sizes, dtype=torch.float32, device="cpu")
    assert isinstance(window, Window)
    return window


def as_double(leaves: Leaves) -> Leaves:
    return {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}


def scan(case: Any, leaves: Leaves, operator: Settings, tokens: slice = slice(None), **changes: Any) -> Any:
    arguments = {n: t for n, t in leaves.items() if n != "max_norm" and not n.startswith("past.")}
    if "past.x" in leaves:
        past = {name: leaves.get(f"past.{name}", t) for name, t in no_past(case, operator)._asdict().items()}
        changes = {"initial_state": Window(**past)} | changes
    chosen = {n: torch.tensor(v) if isinstance(v, list) else v for n, v in operator.items()}
    chosen |= {n: leaves[n] for n in ("max_norm",) if n in leaves}
    return case.scan(arguments, tokens, mitigation=Mitigation(**chosen), **changes)


def flat(results: tuple) -> dict[str, Tensor]:
    """y, the final state or the parts of the window, the states."""
    named = dict(zip(("y", "state", "states"), results, strict=False))
    state = named["state"]
    if isinstance(state, Window):
        named |= {f"window {n}": t for n, t in state._asdict().items()}
        del named["state"]
    return {name: t for name, t in named.items() if t.numel()}


def compare(case: Any, actual: tuple, expected: tuple, close: Any, tolerance: float = TOLERANCE) -> None:
    """Two pairs of (results, leaves): values and, for random cotangents, gradients of every leaf."""
    ours, theirs = flat(actual[0]), flat(expected[0])
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        close(value, theirs[name], tolerance, name, floor=1e-2)
    grads = []
    for outputs, leaves in ((ours, actual[1]), (theirs, expected[1])):
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs.values()]
        grads.append(torch.autograd.grad(list(outputs.values()), list(leaves.values()), cotangents))
    # states after every k tokens add as many terms to a gradient
    terms = math.sqrt(theirs["states"].shape[1]) if "states" in theirs else 1.0
    for name, one, other in zip(actual[1], *grads, strict=True):
        close(one, other, tolerance, f"gradient of {name}", floor=case.size_of_sum(name) * terms or 1e-2)


def draw_position(data: Any, batch: int) -> Tensor | None:
    counts = data.draw(st.none() | st.lists(st.integers(0, 20), min_size=batch, max_size=batch))
    return None if counts is None else torch.tensor(counts)


def later(position: Tensor, starts: Tensor) -> Tensor:
    """Token counts after a piece with these document starts, one token at a time."""
    counts = position.tolist()
    for row, begun in enumerate(starts.tolist()):
        for start in begun:
            counts[row] = 1 if start else counts[row] + 1
    return torch.tensor(counts)


def scan_pieces(
    case: Any, leaves: Leaves, operator: Settings, cuts: list[int], position: Tensor, **changes: Any
) -> Any:
    outputs, starts = [], case.starts()
    for start, stop in itertools.pairwise([0, *cuts, case.length]):
        piece = torch.zeros(case.batch, stop - start, dtype=torch.bool)
        piece = piece if starts is None else starts[:, start:stop]
        y, state = scan(case, leaves, operator, slice(start, stop), position=position, **changes)
        outputs.append(y)
        changes, position = changes | {"initial_state": state}, later(position, piece)
    return torch.cat(outputs, 1), state


@settings(max_examples=150)
@given(data=st.data())
def test_chunked_is_the_oracle(data: Any, scan_cases: Any, check_close: Any) -> None:
    case = data.draw(scan_cases(max_length=70, factors=False))
    operator = data.draw(draw_operator(case.heads, case.length))
    options: Settings = {"position": draw_position(data, case.batch)}
    if data.draw(st.booleans()):
        options["states_every"] = data.draw(st.integers(1, case.length))
    ours = make_leaves(case, operator)
    theirs = as_double(ours)
    chunked = scan(case, ours, operator, **options)
    oracle = scan(case, theirs, operator, backend="naive", **options)
    assert {t.dtype for t in flat(chunked).values()} == {torch.float32}
    compare(case, (chunked, ours), (oracle, theirs), check_close)


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("backend", ["chunked", "naive"])
def test_pieces_equal_the_whole(backend: str, data: Any, scan_cases: Any, check_close: Any) -> None:
    """Split anywhere, position and state handed on, gradients through both ends of every window."""
    case = data.draw(scan_cases(max_length=50, factors=False))
    operator = data.draw(draw_operator(case.heads, case.length))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, case.length - 1)), max_size=5)) - {case.length})
    position = draw_position(data, case.batch)
    carried = torch.zeros(case.batch, dtype=torch.int64) if position is None else position
    one, other = make_leaves(case, operator), make_leaves(case, operator)
    if backend == "naive":
        one, other = as_double(one), as_double(other)
    pieces = scan_pieces(case, other, operator, cuts, carried, backend=backend)
    whole = scan(case, one, operator, position=position, backend=backend)
    compare(case, (pieces, other), (whole, one), check_close)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
@pytest.mark.parametrize(
    "documents", [None, (frozenset({0, 7, 8, 31}), frozenset({16}))], ids=["one", "documents"]
)
def test_single_tokens_equal_the_whole(
    operator: Settings, documents: Any, scan_case: Any, check_close: Any
) -> None:
    case = scan_case(length=45, documents=documents, D="channel", initial_state=True, dt_softplus=True)
    one, other = make_leaves(case, operator), make_leaves(case, operator)
    position = torch.tensor([4, 11])
    steps = scan_pieces(case, other, operator, list(range(1, 45)), position)
    compare(case, (steps, other), (scan(case, one, operator, position=position), one), check_close)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
def test_packed_sequences_equal_separate_calls(operator: Settings, scan_case: Any, check_close: Any) -> None:
    """Each with its own state, position and window; documents inside a sequence; states in order."""
    borders = [0, 1, 20, 33, 50]
    case = scan_case(batch=1, length=50, D="head", documents=(frozenset({25, 33, 40}),))
    one, other = make_leaves(case, operator), make_leaves(case, operator)
    # four rows of state: what four sequences were left with
    before = scan_case(batch=4, length=30, seed=5)
    states = map_state(Tensor.detach, scan(before, make_leaves(before, operator), operator)[1])
    position, cu_seqlens = torch.tensor([30, 2, 0, 9]), torch.tensor(borders)
    packed = scan(
        case, one, operator, cu_seqlens=cu_seqlens, initial_state=states, position=position, states_every=4
    )
    alone = []
    for row, (a, b) in enumerate(itertools.pairwise(borders)):
        state = map_state(lambda t, row=row: t[row : row + 1], states)
        options = {"initial_state": state, "position": position[row : row + 1], "states_every": 4}
        alone.append(scan(case, other, operator, slice(a, b), **options))
    outputs, finals, kept = zip(*alone, strict=True)
    joined = map_state(lambda *t: torch.cat(t), *finals)
    separate = torch.cat(outputs, 1), joined, torch.cat(kept, 1)
    compare(case, (packed, one), (separate, other), check_close)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
@pytest.mark.parametrize("every", [1, 4, 45])
def test_states_are_those_of_pieces(operator: Settings, every: int, scan_case: Any, check_close: Any) -> None:
    """What a plain state would be after k tokens; under sliding_window what the window adds up to."""
    case = scan_case(length=45, documents=(frozenset({7, 20}), frozenset()), initial_state=True)
    leaves = make_leaves(case, operator)
    y, _, states = scan(case, leaves, operator, states_every=every)
    check_close(y, scan(case, leaves, operator)[0], 1e-5, "y")
    assert states.shape == (2, 45 // every, 4, 3, 5)
    if "window" not in operator:
        for i, state in enumerate(states.unbind(1)):
            piece = scan(case, leaves, operator, slice(0, (i + 1) * every))[1]
            check_close(state, piece, 1e-5, f"after {(i + 1) * every} tokens")
    else:
        C = leaves["C"].repeat_interleave(2, dim=2)[:, every - 1 :: every][:, : states.shape[1]]
        read = torch.einsum("bthpn,bthn->bthp", states, C)
        check_close(read, y[:, every - 1 :: every], 1e-5, "what y reads")


@pytest.mark.parametrize("window", [1, 2, 7, 16, 40, 41])
def test_a_token_is_seen_for_exactly_the_window(window: int, scan_case: Any) -> None:
    """Token s changes y of [s, s + r) in its document and, bit for bit, nothing else; in pieces too."""
    case = scan_case(length=60, documents=(frozenset({33}), frozenset()))
    operator = {"name": "sliding_window", "window": window}
    leaves = {name: leaf.detach() for name, leaf in case.leaves().items()}
    other = leaves | {"x": leaves["x"].clone()}
    for row, token, end in ((0, 5, 33), (1, 5, 60), (0, 32, 33), (0, 33, 60), (1, 59, 60)):
        other["x"][:] = leaves["x"]
        other["x"][row, token] += 1.0
        for cuts in ([], [1, 10, 34, 35]):
            outputs = [
                scan_pieces(case, some, operator, cuts, torch.zeros(2, dtype=torch.int64))[0]
                for some in (leaves, other)
            ]
            seen = (outputs[0] != outputs[1]).flatten(2).any(2)
            expected = torch.zeros(2, 60, dtype=torch.bool)
            expected[row, token : min(token + window, end)] = True
            assert torch.equal(seen, expected)


def test_hard_reset_is_a_document_start(scan_case: Any) -> None:
    """Every r-th token, counted from the row's own start or from its document's."""
    case = scan_case(length=30, documents=(frozenset({13}), frozenset()), initial_state=True)
    leaves = case.leaves()
    starts = torch.zeros(2, 30, dtype=torch.bool)
    starts[0, [3, 8, 13, 18, 23, 28]] = True
    starts[1, [0, 5, 10, 15, 20, 25]] = True
    expected = case.scan(leaves, document_starts=starts)
    operator = {"name": "hard_reset", "every": 5}
    for backend in ("chunked", "naive"):
        position = torch.tensor([2, 5])
        y, state = scan(case, leaves, operator, position=position, backend=backend)
        torch.testing.assert_close(y, expected[0])
        torch.testing.assert_close(state, expected[1])
    fresh = scan(case, leaves, operator, position=None)[0]  # 0 is not a positive multiple
    assert torch.equal(fresh[1, 0], case.scan(leaves)[0][1, 0])


@pytest.mark.parametrize("every", [1, 4])
def test_norms_stay_below_the_limit(every: int, scan_case: Any) -> None:
    """Where tokens are clipped, and there only; a head at inf is left alone; y reads what it should."""
    case = scan_case(batch=1, length=20)
    operator = {"name": "state_norm", "max_norm": [0.5, 1.0, math.inf, 0.1], "every": every}
    leaves = {name: leaf.detach() for name, leaf in case.leaves().items()}
    limit = torch.tensor(operator["max_norm"])
    plain = case.scan(leaves, states_every=1)[2]
    y, _, states = scan(case, leaves | {"max_norm": limit}, operator, states_every=1)
    norms = torch.linalg.vector_norm(states, dim=(3, 4))[0]
    over = norms > limit * (1 + 1e-6)
    assert not over[every - 1 :: every].any()
    assert over.any() == (every > 1)
    assert torch.allclose(states[:, :, 2], plain[:, :, 2], rtol=1e-5, atol=1e-6)
    assert torch.allclose(states[:, : every - 1], plain[:, : every - 1], rtol=1e-5, atol=1e-6)
    C = leaves["C"].repeat_interleave(2, dim=2)
    read = torch.einsum("bthpn,bthn->bthp", states, C)
    same = torch.isclose(read, y, rtol=1e-4, atol=1e-5).flatten(2).all(2)[0]
    reads_unclipped = (torch.arange(20) + 1) % every == 0 if every > 1 else torch.zeros(20, dtype=torch.bool)
    assert torch.equal(~same, reads_unclipped)


def test_a_zero_state_has_a_gradient_under_state_norm(scan_case: Any) -> None:
    """The norm of a zero state has none: nothing may turn into NaN."""
    case = scan_case(length=8, initial_state=True)
    leaves = case.leaves()
    with torch.no_grad():
        leaves["initial_state"].zero_()
        leaves["x"].zero_()
    for every in (1, 3):
        y, state = scan(case, leaves, {"name": "state_norm", "max_norm": 1.0, "every": every})
        grads = torch.autograd.grad(y.sum() + state.sum(), list(leaves.values()))
        assert all(g.isfinite().all() for g in grads)
        assert grads[list(leaves).index("x")].any()


def sums_of_windows(leaves: Leaves, window: int, block: int = 512) -> Tensor:
    """y in float64 as h_t - e^{a_{t-r+1} + ... + a_t} h_{t-r}, states by cumulative sums; one document.

    Needs a retention near 1, where the difference loses nothing in float64.
    """
    x, dt, A, B, C = (leaves[name] for name in ("x", "dt", "A", "B", "C"))
    B, C = (m.repeat_interleave(x.shape[2] // m.shape[2], dim=2) for m in (B, C))
    sums = (dt * A).cumsum(1)
    states = ((-sums)[..., None, None].exp() * (dt[..., None] * x)[..., None] * B[:, :, :, None]).cumsum(1)
    states = states - torch.nn.functional.pad(states, (0, 0) * 3 + (window, 0))[:, : x.shape[1]]
    return ((sums[..., None, None].exp() * states) * C[:, :, :, None]).sum(-1)


@pytest.mark.parametrize("window", [1, 3000, 50_000])
def test_131072_tokens_of_sliding_window(window: int, scan_case: Any, check_close: Any) -> None:
    """Retention 1 - 1e-7: required 1e-3, held 1e-4 with every gradient, at once and in pieces."""
    length = 131_072
    case = scan_case(batch=1, length=length, heads=2, headdim=2, groups=1, d_state=4, regime="slow")
    operator = {"name": "sliding_window", "window": window}
    leaves = make_leaves(case, operator)
    double = as_double(leaves)
    cuts = [1, 17, 41_000, 41_001, 77_777]
    y = scan_pieces(case, leaves, operator, cuts, torch.zeros(1, dtype=torch.int64))[0]
    whole, expected = scan(case, leaves, operator)[0], sums_of_windows(double, window)
    check_close(y, expected, 1e-4, "y in pieces")
    check_close(whole, expected, 1e-4, "y")
    cotangent = torch.randn(y.shape)
    reference = torch.autograd.grad(expected, list(double.values()), cotangent.double())
    for name, actual, wanted in zip(
        leaves, torch.autograd.grad(whole, list(leaves.values()), cotangent), reference, strict=True
    ):
        check_close(actual, wanted, 1e-4, f"gradient of {name}", floor=1e-2)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
def test_bf16_inputs(operator: Settings, scan_case: Any, check_close: Any) -> None:
    case = scan_case(length=40, D="head")
    ours = case.leaves(torch.bfloat16) | {
        n: t for n, t in make_leaves(case, operator).items() if n == "max_norm"
    }
    results = scan(case, ours, operator, states_every=8)
    oracle = scan(case, as_double(ours), operator, states_every=8, backend="naive")
    assert results[0].dtype == torch.bfloat16
    for name, expected in flat(oracle).items():
        check_close(flat(results)[name], expected, 2e-2, name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "state_norm", "max_norm": 1.0}, "every=None of state_norm: must be a whole number"),
        ({"name": "state_norm", "max_norm": 1.0, "every": 0}, "every=0 of state_norm"),
        ({"name": "state_norm", "max_norm": 0.0, "every": 1}, "max_norm=0.0 of state_norm: must be positive"),
        ({"name": "state_norm", "max_norm": torch.tensor([1.0, math.nan]), "every": 1}, "max_norm=.*nan"),
        ({"name": "state_norm", "every": 1}, "max_norm=None of state_norm"),
        ({"name": "hard_reset", "every": -3}, "every=-3 of hard_reset"),
        ({"name": "sliding_window", "window": 2.5}, "window=2.5 of sliding_window"),
        ({"name": "sliding_window"}, "window=None of sliding_window"),
        ({"name": "sliding_window", "window": 3, "every": 2}, "every=2: not a setting of sliding_window"),
        ({"name": "hard_reset", "every": 3, "alpha_scale": 0.9}, "alpha_scale=0.9: .* name='forget_more'"),
        ({"name": "delta_scale", "decay_scale": 0.9}, "decay_scale=0.9: .* name='decay_scale'"),
        ({"name": "forget_more", "alpha_scale": 1.1}, r"alpha_scale=1.1 of forget_more: .* \(0, 1\]"),
        ({"name": "forget_more", "insert_scale": 0.0}, "insert_scale=0.0 of forget_more"),
        ({"name": "forget_more", "alpha_scale": torch.tensor([0.5, 0.0])}, "alpha_scale=.* of forget_more"),
        ({"name": "delta_scale", "delta_scale": -1.0}, "delta_scale=-1.0 of delta_scale: must be positive"),
        ({"name": "decay_scale", "decay_scale": math.inf}, "decay_scale=inf of decay_scale"),
        ({"alpha_scale": 0.9}, "alpha_scale=0.9: not a setting of none; use name='forget_more'"),
        ({"name": "token_filter"}, "threshold=None of token_filter: must be finite and not negative"),
        ({"name": "token_filter", "threshold": torch.tensor([0.1, -1.0])}, "threshold=.* of token_filter"),
        (
            {"name": "hard_reset", "every": 3, "heads": ()},
            r"heads=\(\) of hard_reset: .* at least one head",
        ),
        ({"name": "hard_reset", "every": 3, "heads": (2, 2)}, r"heads=\(2, 2\) of hard_reset: .* each once"),
        ({"name": "hard_reset", "every": 3, "heads": (-1,)}, r"heads=\(-1,\) of hard_reset: .* from 0"),
        ({"heads": (0,)}, r"heads=\(0,\): not a setting of none"),
    ],
)
def test_wrong_settings_are_named(arguments: Settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mitigation(**arguments)


def test_factors_above_1_may_stretch_or_hasten() -> None:
    Mitigation("delta_scale", delta_scale=2.0)
    Mitigation("decay_scale", decay_scale=torch.tensor([1.5, 3.0]))


def test_wrong_states_are_named(small_scan: Any) -> None:
    window = Mitigation("sliding_window", window=4)
    past = zero_state(window, 1, 4, 3, 2, 6, dtype=torch.float32, device="cpu")
    _, after = small_scan(mitigation=window, initial_state=past)
    assert [t.shape for t in after] == [t.shape for t in past]
    with pytest.raises(ValueError, match="initial_state is a Window: none continues from a tensor"):
        small_scan(initial_state=past)
    with pytest.raises(ValueError, match="initial_state is a Tensor: sliding_window continues from a Window"):
        small_scan(mitigation=window, initial_state=torch.zeros(1, 4, 3, 6))
    with pytest.raises(
        ValueError, match=r"initial_state.x has shape \(1, 3, 4, 3\): expected \(1, 4, 4, 3\)"
    ):
        small_scan(mitigation=Mitigation("sliding_window", window=5), initial_state=past)
    with pytest.raises(ValueError, match=r"initial_state\.B has dtype float64: expected float32, x's dtype"):
        small_scan(mitigation=window, initial_state=past._replace(B=past.B.double()))
    bad = past._replace(insert=past.insert + math.nan)
    with pytest.raises(ValueError, match=r"initial_state\.insert holds NaN"):
        small_scan(mitigation=window, initial_state=bad, validate=True)
    with pytest.raises(ValueError, match=r"mitigation.max_norm has shape \(3,\): expected \(4,\)"):
        small_scan(mitigation=Mitigation("state_norm", max_norm=torch.ones(3), every=2))
    with pytest.raises(ValueError, match=r"mitigation.heads names \[4, 9\]: the heads are 0 to 3"):
        small_scan(mitigation=Mitigation("forget_more", 0.5, heads=(9, 4, 1)))
    some = Mitigation("sliding_window", window=4, heads=(0, 2))
    with pytest.raises(
        ValueError, match=r"initial_state\.x has shape \(1, 3, 4, 3\): expected \(1, 3, 2, 3\)"
    ):
        small_scan(mitigation=some, initial_state=past)


def test_keys_name_what_a_state_depends_on() -> None:
    mitigations = [
        Mitigation("sliding_window", window=4),
        Mitigation("sliding_window", window=5),
        Mitigation("hard_reset", every=4),
        Mitigation("state_norm", max_norm=4.0, every=4),
        Mitigation("state_norm", max_norm=4.0, every=5),
        Mitigation("state_norm", max_norm=torch.tensor([4.0, 4.0]), every=4),
        Mitigation("hard_reset", every=4, heads=(1,)),
        Mitigation("hard_reset", every=4, heads=(0, 1)),
        Mitigation("token_filter", threshold=4.0),
        Mitigation("token_filter", threshold=torch.tensor([4.0, 4.5])),
    ]
    assert len({m.key for m in mitigations}) == len(mitigations)
    assert Mitigation("sliding_window", window=4).key == "sliding_window(window=4)"


def test_a_returned_window_holds_its_own_memory(scan_case: Any) -> None:
    """A carried window must not keep the tokens of its piece alive, nor see them change."""
    case = scan_case(length=40)
    with torch.no_grad():
        state = scan(case, case.leaves(), {"name": "sliding_window", "window": 4})[1]
    for tensor in state:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()

"""The whole model: all at once = in pieces = one token at a time, gradients through the state included."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conf.schema import ModelConfig
from kernels.ssd import Mitigation
from lightning_modules.backbone import Mamba2LM
from lightning_modules.state import ModelState

OPERATORS: dict[str, dict[str, Any]] = {
    "state_norm": {"max_norm": 0.003, "every": 3},
    "sliding_window": {"window": 3},
    "hard_reset": {"every": 3},
}
TOLERANCE = 1e-4  # fp32 against fp32 in another order of summation; measured: 2e-6


@st.composite
def draw_config(draw: Any) -> ModelConfig:
    n_groups, headdim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 4, 8]))
    n_heads = n_groups * draw(st.integers(1, 2))
    expand = draw(st.sampled_from([e for e in (1, 2, 3) if n_heads * headdim % e == 0]))
    return ModelConfig(
        d_model=n_heads * headdim // expand,
        n_layers=draw(st.integers(1, 2)),
        d_state=draw(st.integers(1, 9)),
        headdim=headdim,
        expand=expand,
        n_groups=n_groups,
        d_conv=draw(st.integers(2, 8)),
        chunk_size=draw(st.sampled_from([16, 32, 64])),
        vocab_size=draw(st.integers(2, 20)),
        d_has_hdim=draw(st.booleans()),
        norm_before_gate=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        dt_limit=draw(st.sampled_from([(0.0, float("inf")), (0.005, 0.05), (0.01, float("inf"))])),
    )


def draw_mitigation(n_heads: int) -> st.SearchStrategy[Mitigation | None]:
    scales = st.sampled_from([0.6, 0.9, 0.999])
    factors = st.one_of(scales, st.lists(scales, min_size=n_heads, max_size=n_heads).map(torch.tensor))
    names = st.sampled_from(["alpha_scale", "insert_scale", "delta_scale", "decay_scale"])
    factors_of = st.dictionaries(names, factors, min_size=1).map(lambda f: Mitigation(name="test", **f))
    tokens, norm = st.integers(1, 12), st.sampled_from([0.003, 0.03])
    norms = st.one_of(norm, st.lists(norm, min_size=n_heads, max_size=n_heads).map(torch.tensor))
    return st.one_of(
        st.none(),
        factors_of,
        st.builds(Mitigation, st.just("state_norm"), max_norm=norms, every=tokens),
        st.builds(Mitigation, st.just("sliding_window"), window=tokens),
        st.builds(Mitigation, st.just("hard_reset"), every=tokens),
    )


def build(config: ModelConfig, seed: int) -> Mamba2LM:
    """A model whose every parameter, norms and D included, is away from its neutral initial value."""
    torch.manual_seed(seed)
    model = Mamba2LM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def run_pieces(
    model: Mamba2LM, ids: Tensor, starts: Tensor | None, cuts: list[int], mitigation: Mitigation | None
) -> tuple[Tensor, ModelState]:
    state, logits = None, []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        piece = None if starts is None else starts[:, start:stop]
        out = model(ids[:, start:stop], state, document_starts=piece, mitigation=mitigation)
        state = out.state
        logits.append(out.logits)
    assert state is not None
    return torch.cat(logits, dim=1), state


def results(model: Mamba2LM, logits: Tensor, state: ModelState) -> dict[str, Tensor]:
    """Logits, every state, and every parameter's gradient of a loss that reads all of them."""
    values = {"logits": logits}
    for i, layer in enumerate(state.layers):
        values |= {f"layer {i} part {j}": t for j, t in enumerate(layer.tensors()) if t.numel()}
    generator = torch.Generator().manual_seed(7)
    loss = sum(
        ((v * torch.randn(v.shape, generator=generator)).sum() for v in values.values()), torch.zeros(())
    )
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters)
    return values | {f"gradient of {n}": g for n, g in zip(names, grads, strict=True)}


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], check_close: Any) -> None:
    largest = max(v.norm().item() for n, v in expected.items() if n.startswith("gradient"))
    for name, value in actual.items():
        # a gradient far below the others is a difference of terms of their size
        floor = 1e-2 * largest if name.startswith("gradient") else 1e-3
        check_close(value, expected[name], TOLERANCE, name, floor=floor)


@settings(max_examples=80)
@given(data=st.data())
def test_pieces_equal_the_whole(data: Any, check_close: Any) -> None:
    config = data.draw(draw_config())
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    mitigation = data.draw(draw_mitigation(config.n_heads))
    single = data.draw(st.booleans())
    cuts = range(1, length) if single else data.draw(st.sets(st.integers(1, length), max_size=4)) - {length}
    ids = torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))
    starts = None
    if data.draw(st.booleans()):
        starts = torch.zeros(batch, length, dtype=torch.bool)
        for row in range(batch):
            starts[row, list(data.draw(st.frozensets(st.integers(0, length - 1), max_size=4)))] = True
    model = build(config, seed=data.draw(st.integers(0, 1000)))

    out = model(ids, document_starts=starts, mitigation=mitigation)
    logits, state = run_pieces(model, ids, starts, sorted(cuts), mitigation)

    assert torch.equal(state.position, out.state.position)
    compare(results(model, logits, state), results(model, out.logits, out.state), check_close)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("cuts", [[], [1, 2, 9, 30], list(range(1, 37))], ids=["whole", "pieces", "tokens"])
def test_selected_rows_continue_under_a_mitigation(name: str, cuts: list[int], check_close: Any) -> None:
    """Rows of different positions, selected and repeated half way: as each of them from its own start."""
    config = ModelConfig(d_model=16, headdim=8, d_state=4, n_layers=2, vocab_size=11)
    model, mitigation = build(config, seed=5), Mitigation(name, **OPERATORS[name])
    ids, index = torch.randint(11, (3, 20)), torch.tensor([2, 0, 2])
    starts = torch.zeros(3, 20, dtype=torch.bool)
    starts[1, 4] = starts[2, 13] = True
    more = torch.randint(11, (3, 17))
    with torch.no_grad():
        whole = torch.cat([ids[index], more], 1)
        borders = torch.cat([starts[index], torch.zeros(3, 17, dtype=torch.bool)], 1)
        expected = run_pieces(model, whole, borders, cuts, mitigation)[0][:, 20:]
        state = model(ids, document_starts=starts, mitigation=mitigation).state
        actual = model(more, state.rows(index).detach(), mitigation=mitigation).logits
    check_close(actual, expected, TOLERANCE, "logits")


def test_position_counts_from_the_last_document_start() -> None:
    model = build(ModelConfig(d_model=8, headdim=4, d_state=4, n_layers=1), seed=0)
    starts = torch.zeros(3, 9, dtype=torch.bool)
    starts[1, 4] = starts[2, 0] = starts[2, 8] = True
    first = model(torch.zeros(3, 9, dtype=torch.int64), document_starts=starts).state
    assert first.position.tolist() == [9, 5, 1]
    assert model(torch.zeros(3, 2, dtype=torch.int64), first).state.position.tolist() == [11, 7, 3]


@pytest.mark.parametrize("chunk_size", [16, 64, 256])
def test_chunk_size_changes_no_result(chunk_size: int, check_close: Any) -> None:
    ids, outcomes = torch.randint(11, (2, 150)), []
    for size in (32, chunk_size):
        config = ModelConfig(d_model=16, headdim=8, d_state=8, chunk_size=size, vocab_size=11)
        model = build(config, seed=1)
        out = model(ids)
        outcomes.append(results(model, out.logits, out.state))
    compare(outcomes[1], outcomes[0], check_close)


def test_token_losses_are_the_cross_entropy_of_the_logits(check_close: Any) -> None:
    config = ModelConfig(d_model=16, headdim=8, d_state=8, vocab_size=11)
    model, ids, targets = build(config, seed=2), torch.randint(11, (2, 40)), torch.randint(11, (2, 40))
    losses, state = model.token_losses(ids, targets)
    out = model(ids)
    expected = F.cross_entropy(out.logits.transpose(1, 2), targets, reduction="none")
    check_close(losses, expected, 1e-5)
    assert torch.equal(state.layers[-1].ssm, out.state.layers[-1].ssm)
    grads = torch.autograd.grad(losses.sum(), list(model.parameters()))
    for actual, wanted in zip(
        grads, torch.autograd.grad(expected.sum(), list(model.parameters())), strict=True
    ):
        check_close(actual, wanted, 1e-5)


def test_a_mitigation_changes_the_logits() -> None:
    """The same object runs with any mitigation; a neutral one changes nothing."""
    model, ids = (
        build(ModelConfig(d_model=16, headdim=8, d_state=8, vocab_size=11), seed=3),
        torch.arange(11)[None],
    )
    plain = model(ids).logits
    assert torch.equal(model(ids, mitigation=Mitigation(name="neutral")).logits, plain)
    for name, operator in OPERATORS.items():
        assert not torch.allclose(model(ids, mitigation=Mitigation(name, **operator)).logits, plain)
    for factor in ("alpha_scale", "insert_scale", "delta_scale", "decay_scale"):
        assert not torch.allclose(model(ids, mitigation=Mitigation(name="m", **{factor: 0.5})).logits, plain)


def test_bf16_autocast_keeps_states_and_gradients_in_fp32(check_close: Any) -> None:
    """Under autocast the state stays fp32 and the logits follow fp32 to bf16's 3 digits."""
    config = ModelConfig(d_model=32, headdim=8, d_state=16, vocab_size=11, chunk_size=16)
    model, ids = build(config, seed=4), torch.randint(11, (2, 100))
    expected = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids)
        pieces, state = run_pieces(model, ids, None, [1, 30, 77], None)
    assert out.logits.dtype == torch.bfloat16
    for layer in out.state.layers:
        assert layer.ssm.dtype == torch.float32
    check_close(out.logits, expected.logits, 3e-2, "logits")
    check_close(pieces, expected.logits, 3e-2, "logits in pieces")
    check_close(state.layers[-1].ssm, expected.state.layers[-1].ssm, 3e-2, "state")
    out.logits.float().square().mean().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in model.parameters()
    )

"""What may not influence what: the future, other rows, other documents."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import ModelConfig
from lightning_modules.backbone import Mamba2LM

LENGTH = 70


@pytest.fixture
def model() -> Mamba2LM:
    torch.manual_seed(0)
    config = ModelConfig(
        d_model=16, n_layers=3, d_state=8, headdim=8, n_groups=2, chunk_size=16, vocab_size=13
    )
    model = Mamba2LM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(13, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def starts() -> Tensor:
    """Documents of row 0: [0, 20), [20, 21), [21, 48), [48, 70); the last start is a border of chunks."""
    starts = torch.zeros(2, LENGTH, dtype=torch.bool)
    starts[0, [20, 21, 48]] = starts[1, 33] = True
    return starts


def change(ids: Tensor, token: int) -> Tensor:
    other = ids.clone()
    other[0, token] = (other[0, token] + 1) % 13
    return other


@pytest.mark.parametrize("token", [0, 15, 16, 40, LENGTH - 1])
def test_a_token_changes_nothing_before_it_nor_other_rows(model: Mamba2LM, ids: Tensor, token: int) -> None:
    """Bit for bit; and it reaches every later token of its row."""
    before, after = model(ids), model(change(ids, token))
    changed = (before.logits != after.logits).any(2)
    assert changed[0].tolist() == [t >= token for t in range(LENGTH)]
    assert not changed[1].any()
    for old, new in zip(before.state.layers, after.state.layers, strict=True):
        assert torch.equal(old.ssm[1], new.ssm[1])
        assert not torch.equal(old.ssm[0], new.ssm[0])


@pytest.mark.parametrize(("token", "end"), [(5, 20), (19, 20), (20, 21), (30, 48), (47, 48), (48, LENGTH)])
def test_a_token_changes_no_logits_of_another_document(
    model: Mamba2LM, ids: Tensor, starts: Tensor, token: int, end: int
) -> None:
    """Nor what the state hands on once the document has ended: up to the rounding of shared sums, 1e-5."""
    before, after = (model(i, document_starts=starts) for i in (ids, change(ids, token)))
    changed = (before.logits - after.logits).abs().amax(2) / before.logits.abs().max()
    assert (changed[0, token:end] > 1e-3).any()
    assert not changed[0, :token].any()
    assert (changed[0, end:] < 1e-5).all()
    assert not changed[1].any()
    for old, new in zip(before.state.layers, after.state.layers, strict=True):
        assert same(old.ssm[1], new.ssm[1], 0.0)
        assert same(old.conv[1], new.conv[1], 0.0)
        assert same(old.ssm, new.ssm, 1e-5) == (end < LENGTH)
        if end < LENGTH:
            assert same(old.conv, new.conv, 1e-5)


def same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * a.abs().max())


def gradients(model: Mamba2LM, ids: Tensor, starts: Tensor, span: slice) -> tuple[list[Tensor], Tensor]:
    """Of the loss of row 0's tokens `span`: by every parameter, and by every token's embedding (B, T, d)."""
    embedded: list[Tensor] = []
    hook = model.backbone.embedding.register_forward_hook(lambda module, args, out: embedded.append(out))
    losses, _ = model.token_losses(ids, ids.roll(-1, 1), document_starts=starts)
    hook.remove()
    *by_parameter, by_token = torch.autograd.grad(losses[0, span].sum(), [*model.parameters(), embedded[0]])
    return by_parameter, by_token


def test_a_document_sends_no_gradient_into_another(
    model: Mamba2LM, ids: Tensor, starts: Tensor, check_close: Any
) -> None:
    """Up to rounding: by a token of another document, and by parameters when another document changes."""
    span = slice(21, 48)
    by_parameter, by_token = gradients(model, ids, starts, slice(21, 47))
    size = by_token.norm(dim=2)
    assert (size[0, 21:47] > 0).all()
    outside = torch.cat([size[0, : span.start], size[0, span.stop :], size[1]])
    assert outside.max() <= 1e-6 * size.max()
    for token in (5, 20, 48):
        others, _ = gradients(model, change(ids, token), starts, slice(21, 47))
        for actual, expected in zip(others, by_parameter, strict=True):
            check_close(actual, expected, 1e-5, floor=1e-2 * max(g.norm().item() for g in by_parameter))


def test_gradients_are_causal(model: Mamba2LM, ids: Tensor, starts: Tensor) -> None:
    """The loss of the first tokens sends exactly nothing to later ones."""
    _, by_token = gradients(model, ids, torch.zeros_like(starts), slice(0, 33))
    assert not by_token[0, 33:].any()
    assert not by_token[1].any()
    assert by_token[0, :33].any(1).all()

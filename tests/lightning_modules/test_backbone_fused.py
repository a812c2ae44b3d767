"""A model whose layers are the fused operator of a GPU, here in the interpreter, against the plain one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import ModelConfig
from kernels.mixer import takes
from kernels.ssd import Mitigation
from lightning_modules import layer
from lightning_modules.backbone import Mamba2LM
from lightning_modules.finite import watch_forward
from lightning_modules.layer import Mamba2
from tests.lightning_modules.test_backbone_pieces import build

SIZES: dict[str, Any] = {
    "d_model": 16, "n_layers": 2, "d_state": 16, "headdim": 16, "n_groups": 1, "vocab_size": 30,
}  # fmt: skip
CASES = {
    "plain": ({}, None),
    "limits": ({"dt_limit": (0.005, 0.05), "norm_before_gate": True}, None),
    "D by channel, untied": ({"d_has_hdim": True, "tie_embeddings": False}, None),
    "forget_more": ({}, Mitigation("forget_more", alpha_scale=0.9, insert_scale=0.8)),
    "state_norm stays composed": ({}, Mitigation("state_norm", max_norm=0.01, every=4)),
}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a GPU; how many layers were fused."""
    calls: list[int] = []
    theirs = layer.fused_mixer

    def counted(*tensors: Tensor, **options: Any) -> Any:
        calls.append(1)
        return theirs(*tensors, **options)

    monkeypatch.setattr(layer, "fused_mixer", counted)
    monkeypatch.setattr(Mamba2, "_fuses", lambda self, _, m: self.scan is None and takes(m))
    return calls


def run(model: Mamba2LM, mitigation: Mitigation | None) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and states of two pieces with document starts, and all gradients."""
    torch.manual_seed(1)
    ids, starts = torch.randint(30, (2, 21)), torch.rand(2, 21) < 0.2
    made, state = [], None
    for piece in (slice(0, 8), slice(8, 21)):
        out = model(ids[:, piece], state, document_starts=starts[:, piece], mitigation=mitigation)
        made, state = [*made, out.logits], out.state
    results = [*made, *(t for t in state.tensors() if t.is_floating_point())]
    loss = sum((t.float().square().mean() for t in results), torch.zeros(()))
    return results, list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("name", CASES)
def test_the_fused_model_is_the_composed_one(
    name: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, check_close: Any
) -> None:
    changes, mitigation = CASES[name]
    model = build(ModelConfig(**SIZES | changes), seed=0)
    expected = run(model, mitigation)
    calls = request.getfixturevalue("fused")
    actual = run(model, mitigation)
    assert len(calls) == (0 if "composed" in name else 4)
    for what, a, e in zip(("results", "gradients"), actual, expected, strict=True):
        for one, other in zip(a, e, strict=True):
            check_close(one, other, 1e-4, what)


def test_what_is_not_finite_is_found_between_the_parts(fused: list[int]) -> None:
    """The locator takes the operator apart, and puts it together again."""
    model = build(ModelConfig(**SIZES), seed=0)
    mixer: Any = model.backbone.layers[1].mixer
    with torch.no_grad():
        mixer.conv1d.bias.fill_(torch.inf)
    with watch_forward(model) as found, torch.no_grad():
        model(torch.zeros(1, 5, dtype=torch.int64))
    assert found[0] == "the input of backbone.layers.1.mixer.norm"
    assert not fused
    with torch.no_grad():
        mixer.conv1d.bias.zero_()
    model(torch.zeros(1, 5, dtype=torch.int64))
    assert len(fused) == 2

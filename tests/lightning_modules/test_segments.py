"""Backpropagation in segments against one long forward pass: gradients, hooks, memory."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.cross_entropy.sliced as sliced
from conf.schema import ModelConfig
from kernels.ssd import Mitigation
from lightning_modules.backbone import Mamba2LM
from lightning_modules.segments import segmented_losses
from lightning_modules.state import ModelState
from tests.kernels.test_cross_entropy import LogitsFormed

ROOT = Path(__file__).parents[2]
CONFIG = ModelConfig(d_model=32, n_layers=2, d_state=8, headdim=16, vocab_size=40, chunk_size=16)
BATCH, LENGTH = 2, 70
NONE = Mitigation()


@pytest.fixture
def model() -> Mamba2LM:
    return Mamba2LM(CONFIG)


@pytest.fixture
def tokens() -> dict[str, Tensor]:
    ids = torch.randint(CONFIG.vocab_size, (BATCH, LENGTH + 1))
    return {"ids": ids[:, :-1], "targets": ids[:, 1:]}


def random_state(mitigation: Mitigation = NONE) -> ModelState:
    zero = ModelState.zeros(CONFIG, BATCH, "cpu", torch.float32, mitigation)
    *layers, position = zero.tensors()
    return zero.with_tensors([*(torch.randn_like(t).requires_grad_() for t in layers), position + 3])


def gradients(model: Mamba2LM, losses: Tensor, *more: Tensor) -> list[Tensor]:
    weight = torch.rand(losses.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((weight * losses).sum(), [*model.parameters(), *more]))


@pytest.mark.parametrize("length", [1, 7, 16, 32, 69])
@pytest.mark.parametrize("given", ["zero", "state", "documents"])
def test_gradients_are_those_of_one_forward(
    model: Mamba2LM, tokens: dict[str, Tensor], length: int, given: str, check_close: Any
) -> None:
    state = random_state() if given == "state" else None
    starts = torch.rand(BATCH, LENGTH) < 0.1 if given == "documents" else None
    leaves = [] if state is None else state.tensors()[:-1]
    whole, final = model.token_losses(**tokens, state=state, document_starts=starts)
    expected = gradients(model, whole, *leaves)
    losses, last = segmented_losses(model, **tokens, state=state, document_starts=starts, length=length)
    check_close(losses, whole, 1e-5, "losses")
    for a, e in zip(last.tensors(), final.tensors(), strict=True):
        check_close(a, e, 1e-5, "state")
    for a, e in zip(gradients(model, losses, *leaves), expected, strict=True):
        check_close(a, e, 1e-5, "gradient")


@pytest.mark.parametrize(
    "mitigation",
    [
        Mitigation("forget_more", alpha_scale=0.95, insert_scale=0.8),
        Mitigation("sliding_window", window=9),
        Mitigation("state_norm", max_norm=0.5, every=6),
        Mitigation("hard_reset", every=11),
    ],
    ids=lambda mitigation: mitigation.name,
)
def test_under_a_mitigation(
    model: Mamba2LM, tokens: dict[str, Tensor], mitigation: Mitigation, check_close: Any
) -> None:
    whole, _ = model.token_losses(**tokens, mitigation=mitigation)
    losses, _ = segmented_losses(model, **tokens, mitigation=mitigation, length=16)
    for a, e in zip(gradients(model, losses), gradients(model, whole), strict=True):
        check_close(a, e, 1e-5, "gradient")


def test_under_autocast(model: Mamba2LM, tokens: dict[str, Tensor], check_close: Any) -> None:
    """The backward pass recomputes in the precision of the forward."""
    with torch.autocast("cpu", torch.bfloat16):
        whole, _ = model.token_losses(**tokens)
        losses, _ = segmented_losses(model, **tokens, length=32)
    check_close(losses, whole, 1e-2, "losses")
    for a, e in zip(gradients(model, losses), gradients(model, whole), strict=True):
        check_close(a, e, 3e-2, "gradient")


def test_truncation_cuts_where_it_says(model: Mamba2LM, tokens: dict[str, Tensor], check_close: Any) -> None:
    """After two segments of 20: [0, 40) and [40, 70) have gradients of their own."""
    first = {name: t[:, :40] for name, t in tokens.items()}
    second = {name: t[:, 40:] for name, t in tokens.items()}
    some, state = model.token_losses(**first)
    more, _ = model.token_losses(**second, state=state.detach())
    expected = gradients(model, torch.cat([some, more], 1))
    losses, _ = segmented_losses(model, **tokens, length=20, truncate_after=2)
    for a, e in zip(gradients(model, losses), expected, strict=True):
        check_close(a, e, 1e-5, "gradient")
    whole = gradients(model, segmented_losses(model, **tokens, length=20)[0])
    assert any((a - e).norm() > 1e-3 * e.norm() for a, e in zip(whole, expected, strict=True))


def test_every_parameter_is_accumulated_once(model: Mamba2LM, tokens: dict[str, Tensor]) -> None:
    """What DDP and ZeRO hang their reductions on runs once a backward pass, however many segments."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():

        def count(_: Tensor, name: str = name) -> None:
            counts[name] = counts.get(name, 0) + 1

        parameter.register_post_accumulate_grad_hook(count)
    segmented_losses(model, **tokens, length=7)[0].sum().backward()
    assert counts == dict.fromkeys(dict(model.named_parameters()), 1)


def test_all_segments_but_the_last_are_read_twice(model: Mamba2LM, tokens: dict[str, Tensor]) -> None:
    lengths: list[int] = []
    model.backbone.layers[0].register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    segmented_losses(model, **tokens, length=20)[0].sum().backward()
    assert lengths == [20, 20, 20, 10, 20, 20, 20]


def test_no_logits_are_formed_to_be_thrown_away(
    model: Mamba2LM, tokens: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of recomputed segments once for their losses and once for their gradients."""
    monkeypatch.setattr(sliced, "SLICE_LOGITS", 5 * CONFIG.vocab_size)
    with LogitsFormed(CONFIG.vocab_size) as formed:
        segmented_losses(model, **tokens, length=20)[0].sum().backward()
    assert formed.tokens == 2 * BATCH * LENGTH


MEASURE = """
import sys, torch
from conf.schema import ModelConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.cpu import map_large_tensors
from lightning_modules.memory import peak_memory_mib
from lightning_modules.segments import segmented_losses
torch.set_num_threads(1)
map_large_tensors()
d_model, length = map(int, sys.argv[1:])
model = Mamba2LM(ModelConfig(d_model=d_model, n_layers=2, d_state=16, headdim=32, vocab_size=256))
ids = torch.randint(256, (1, length + 1))
segmented_losses(model, ids[:, :-1], ids[:, 1:], length=4096)[0].sum().backward()
print(peak_memory_mib(torch.device("cpu")))
"""


def peak_mib(d_model: int, length: int) -> float:
    command = [sys.executable, "-c", MEASURE, str(d_model), str(length)]
    return float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def test_memory_is_that_of_a_segment() -> None:
    short, long = peak_mib(32, 8_192), peak_mib(32, 65_536)
    assert long < 1.05 * short, (short, long)


@pytest.mark.slow
def test_a_million_tokens_train_in_the_memory_of_65536() -> None:
    """At the demo's width."""
    short, long = peak_mib(128, 65_536), peak_mib(128, 1_048_576)
    assert long < 1.15 * short, (short, long)

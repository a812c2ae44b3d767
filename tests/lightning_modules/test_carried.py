"""Truncated backpropagation through time: gradients against forwards over the whole text."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conf.initial_state import InitialStateConfig
from conf.schema import (
    DataConfig,
    DocumentsConfig,
    OptimConfig,
    TrainConfig,
    TrainerConfig,
)
from lightning_modules.backbone import Mamba2LM
from lightning_modules.initial_state import Rows
from tests.conftest import CheckClose
from tests.lightning_modules.test_train_step import MODEL, Batch, LanguageModel, pytestmark, run_step

__all__ = ["pytestmark"]
ROWS, STEPS, LENGTH = 4, 4, 21
Gradients = dict[str, Tensor]


class Recorder(LanguageModel):
    """Keeps the gradients of sum(nll), step by step."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.gradients: list[Gradients] = []

    def configure_gradient_clipping(self, *arguments: Any, **settings: Any) -> None:
        self.gradients.append({n: p.grad * ROWS * LENGTH for n, p in self.model.named_parameters()})


def make_config(segments: int, accumulate: int = 1, reset_probability: float = 0.0) -> TrainConfig:
    """Weights stay as they are: the step is below what fp32 can add."""
    return TrainConfig(
        model=MODEL,
        data=DataConfig(
            name="documents",
            batch_size=ROWS,
            train_length=LENGTH,
            documents=DocumentsConfig(layout="consecutive"),
        ),
        optim=OptimConfig(grad_clip=0, lr=1e-30, weight_decay=0),
        trainer=TrainerConfig(max_steps=STEPS, accumulate=accumulate),
        initial_state=InitialStateConfig(
            name="carried", bptt_segments=segments, reset_probability=reset_probability
        ),
    )


@pytest.fixture
def text() -> Batch:
    """Rows of STEPS segments: the first without a document start, the others with some, also at borders."""
    ids = torch.randint(256, (ROWS, STEPS * LENGTH + 1))
    starts = torch.rand(ROWS, STEPS * LENGTH) < 0.02
    starts[0] = False
    starts[1, LENGTH] = starts[2, 2 * LENGTH + 5] = True
    weight = torch.ones(starts.shape)
    return {"ids": ids[:, :-1], "targets": ids[:, 1:], "document_starts": starts, "loss_weight": weight}


def train(config: TrainConfig, text: Batch) -> Recorder:
    module = Recorder(config)
    shares = config.trainer.accumulate
    segments = zip(*(value.split(LENGTH, 1) for value in text.values()), strict=True)
    batches = [
        dict(zip(text, (value.chunk(shares)[part] for value in segment), strict=True))
        for segment in segments
        for part in range(shares)
    ]
    answer = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    run_step(module, batches, [{**batches[0], "answer": answer[: ROWS // shares]}])
    assert len(module.gradients) == STEPS
    return module


def gradients_of(model: Mamba2LM, loss: Tensor) -> Gradients:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def piece(text: Batch, first: int, last: int) -> Batch:
    return {name: value[:, first * LENGTH : last * LENGTH] for name, value in text.items()}


@pytest.mark.parametrize("segments", [STEPS, STEPS + 3])
def test_through_all_segments_it_is_one_long_forward(
    segments: int, text: Batch, check_close: CheckClose
) -> None:
    module = train(make_config(segments), text)
    losses, _ = module.model.token_losses(
        text["ids"], text["targets"], document_starts=text["document_starts"]
    )
    for name, expected in gradients_of(module.model, losses.sum()).items():
        check_close(sum(step[name] for step in module.gradients), expected, 1e-5, name)  # type: ignore[arg-type]
    last = losses[:, -LENGTH:].mean().item()
    assert module.train_loss == pytest.approx(last, rel=1e-5)


@pytest.mark.parametrize("segments", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_stops_before_the_first_of_k_segments(
    segments: int, accumulate: int, text: Batch, check_close: CheckClose
) -> None:
    module = train(make_config(segments, accumulate, reset_probability=0.3), text)
    model = module.model
    resets = [module.initial_state.resets(Rows(s, 0, 0, ROWS), torch.device("cpu")) for s in range(STEPS)]
    assert any(reset.any() for reset in resets[1:])
    starts = text["document_starts"].clone()
    for step, reset in enumerate(resets):
        starts[:, step * LENGTH] |= reset
    text = {**text, "document_starts": starts}
    for step, gradients in enumerate(module.gradients):
        first, state = max(0, step + 1 - segments), None
        if first:
            past = piece(text, 0, first)
            state = model(past["ids"], document_starts=past["document_starts"]).state.detach()
        window = piece(text, first, step + 1)
        losses, _ = model.token_losses(
            window["ids"], window["targets"], state, document_starts=window["document_starts"]
        )
        for name, expected in gradients_of(model, losses[:, -LENGTH:].sum()).items():
            check_close(gradients[name], expected, 1e-5, f"step {step}: {name}")


def test_the_gradient_differs_with_k(text: Batch) -> None:
    """What the tests above would not notice if every k were the same."""
    one, two = (train(make_config(k), text).gradients[-1] for k in (1, 2))
    for name in ("backbone.layers.0.mixer.A_log", "backbone.layers.0.mixer.in_proj.weight"):
        assert (one[name] - two[name]).norm() > 1e-3 * two[name].norm()


def test_convolution_and_count_are_carried_too(text: Batch) -> None:
    module = train(make_config(2), text)
    saved = module.initial_state.state_dict(module.trainer)
    past = piece(text, 0, STEPS - 1)  # the state before the last segment, which is kept to be read again
    expected = module.model(past["ids"], document_starts=past["document_starts"]).state
    for carried, tensor in zip(saved["states"], expected.tensors(), strict=True):
        torch.testing.assert_close(carried, tensor)
    (segment,) = saved["past"]
    assert torch.equal(segment["ids"], piece(text, STEPS - 1, STEPS)["ids"])


def test_passkey_rows_go_on_from_prompt_to_prompt_and_begin_anew_behind_a_curriculum():
    """No batch of prompts marks document starts: two of them read as one text of twice the length."""
    data = DataConfig(train_length=2 * 128, curriculum_length=128, curriculum_steps=2, batch_size=2)
    config = TrainConfig(model=MODEL, data=data, initial_state=InitialStateConfig(name="carried"))
    module = LanguageModel(config)
    module.configure_model()
    model, carried, rule = module.model, module.initial_state, module.mitigation
    ids = torch.randint(256, (4, 3, 128))
    with torch.no_grad():
        for step in range(3):
            batch, rows = {"ids": ids[:, step]}, Rows(step, 0, 0, 4)
            state = carried.begin(model, batch, rows)
            assert state is not None
            starts = batch["document_starts"]
            _, final = model.hidden(batch["ids"], state, document_starts=starts, mitigation=rule)
            carried.end(batch, rows, final)
        _, whole = model.hidden(ids.flatten(1), mitigation=rule)
        for got, expected in zip(final.tensors(), whole.tensors(), strict=True):
            torch.testing.assert_close(got, expected)
        longer = {"ids": torch.randint(256, (2, 256))}
        first = carried.begin(model, longer, Rows(3, 0, 0, 2))
    assert first is not None
    assert first.batch_size == 2
    assert not any(tensor.any() for tensor in first.tensors())

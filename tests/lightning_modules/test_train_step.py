"""What one optimizer step and one validation compute."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from conf.schema import DataConfig, MitigationConfig, ModelConfig, OptimConfig, TrainConfig, TrainerConfig
from data.batches import weigh_steps
from kernels.ssd import Mitigation
from lightning_modules.callbacks.summary import state_elements, summarize
from lightning_modules.finite import watch_forward
from lightning_modules.language_model import LanguageModel
from lightning_modules.run_dir import RunError

pytestmark = [
    # Lightning 2.6 calls a PyTorch function by its old name, on every batch.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
]
MODEL = ModelConfig(d_model=32, n_layers=2, d_state=16, headdim=16, chunk_size=16)
Batch = dict[str, Tensor]


def make_config(accumulate: int = 1, **more: Any) -> TrainConfig:
    return TrainConfig(
        model=MODEL,
        data=DataConfig(name="documents", batch_size=8, train_length=24),
        optim=OptimConfig(grad_clip=0),
        trainer=TrainerConfig(max_steps=1, accumulate=accumulate),
        **more,
    )


def make_batch(rows: int = 8, length: int = 24) -> Batch:
    """Random tokens whose loss weights differ greatly between rows; some rows have none."""
    ids = torch.randint(256, (rows, length + 1))
    weight = torch.rand(rows, length) * 10.0 ** torch.randint(-3, 2, (rows, 1))
    weight[::3] = 0
    answer = torch.zeros(rows, length, dtype=torch.bool)
    answer[:, -5:] = True
    return {"ids": ids[:, :-1], "targets": ids[:, 1:].clone(), "loss_weight": weight, "answer": answer}


class Recorder(LanguageModel):
    """Keeps the gradients that the optimizer gets."""

    def configure_gradient_clipping(self, *arguments: Any, **settings: Any) -> None:
        super().configure_gradient_clipping(*arguments, **settings)
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}


def run_step(
    module: LanguageModel, batches: list[Batch], validation: list[Batch] | None = None
) -> pl.Trainer:
    config = module.config.trainer
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=config.max_steps,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=module.config.optim.grad_clip or None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train, validate = (
        DataLoader(part, batch_size=None)  # type: ignore[arg-type]
        for part in (list(weigh_steps(batches, config.accumulate)), validation or [make_batch()])
    )
    trainer.fit(module, train, validate)
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2, 8])
@pytest.mark.parametrize("mitigation", ["none", "forget_more"])
def test_accumulated_gradients_are_the_big_batchs(accumulate: int, mitigation: str) -> None:
    change = MitigationConfig(name=mitigation, alpha_scale=0.9 if mitigation == "forget_more" else 1.0)  # type: ignore[arg-type]
    batch = make_batch()
    parts = [{name: value.chunk(accumulate)[i] for name, value in batch.items()} for i in range(accumulate)]
    module = Recorder(make_config(accumulate, mitigation=change))
    run_step(module, parts)

    reference = LanguageModel(module.config)
    reference.configure_model()
    losses, _ = reference.model.token_losses(batch["ids"], batch["targets"], mitigation=reference.mitigation)
    loss = (batch["loss_weight"] * losses).sum() / batch["loss_weight"].sum()
    loss.backward()
    assert module.train_loss == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in reference.model.named_parameters():
        torch.testing.assert_close(module.gradients[name], parameter.grad, rtol=1e-4, atol=1e-7)
    norm = torch.stack([p.grad.norm() for p in reference.parameters()]).norm()
    assert module.grad_norm == pytest.approx(norm.item(), rel=1e-4)


def test_the_norm_is_noted_before_clipping() -> None:
    config = make_config()
    config.optim.grad_clip = 1e-3
    module = Recorder(config)
    run_step(module, [make_batch()])
    assert module.grad_norm > 1e-2
    clipped = torch.stack([g.norm() for g in module.gradients.values()]).norm()
    assert clipped.item() == pytest.approx(1e-3, rel=1e-3)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    weights = []
    for seed, noise in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(noise)
        module = LanguageModel(make_config(seed=seed))
        module.configure_model()
        model = module.model
        module.configure_model()
        assert module.model is model
        weights.append(model.lm_head.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_initial_weights_do_not_depend_on_the_device_that_a_strategy_builds_on() -> None:
    modules = [LanguageModel(make_config()) for _ in range(2)]
    modules[0].configure_model()
    with torch.device("meta"):  # as Lightning's strategies do with their own device
        modules[1].configure_model()
    for one, other in zip(*(m.model.parameters() for m in modules), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_validation_metrics_against_plain_code() -> None:
    module = LanguageModel(make_config())
    module.configure_model()
    batch = make_batch()
    with torch.no_grad():
        logits = module.model(batch["ids"]).logits
    guesses = logits.argmax(-1)
    # Rows 0 and 1 right, row 2 all but one digit right; the rest as the model guesses, that is wrong.
    batch["targets"][:3, -5:] = guesses[:3, -5:]
    batch["targets"][2, -2] = (guesses[2, -2] + 1) % 256
    batch["targets"][3:, -5:] = (guesses[3:, -5:] + 1) % 256
    batch["answer"][7] = False  # a row without an answer
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 3), slice(3, 8))]

    module.trainer = run_step(Recorder(make_config()), [make_batch()])  # any trainer on this device
    module.log_dict = lambda *arguments, **settings: None  # type: ignore[method-assign]
    with torch.no_grad():
        module.on_validation_epoch_start()
        for i, half in enumerate(halves):
            module.validation_step(half, i)
        module.on_validation_epoch_end()

    nll = -logits.log_softmax(-1).gather(-1, batch["targets"].unsqueeze(-1)).squeeze(-1)
    expected = {
        "val/loss": (batch["loss_weight"] * nll).sum() / batch["loss_weight"].sum(),
        "val/exact": 2 / 7,
        "val/digits": 14 / 35,
        "val/answer_loss": nll[batch["answer"]].mean(),
    }
    assert module.val_metrics == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-5)


def test_validation_metrics_reach_callbacks_that_monitor_them() -> None:
    module = LanguageModel(make_config())
    trainer = run_step(module, [make_batch()], [make_batch()])
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(module.val_metrics["val/loss"])


def poison(module: LanguageModel, name: str) -> None:
    with torch.no_grad():
        module.get_submodule(name).weight.fill_(3e38)


@pytest.mark.parametrize(
    ("poisoned", "blamed"),
    [
        ("model.backbone.layers.1.mixer.in_proj", "the output of backbone.layers.1.mixer.in_proj"),
        ("model.backbone.layers.0.mixer.out_proj", "the output of backbone.layers.0.mixer.out_proj"),
        ("model.backbone.layers.0.mixer.conv1d", "the input of backbone.layers.0.mixer.norm"),
    ],
)
def test_the_first_layer_that_overflows_is_named(poisoned: str, blamed: str) -> None:
    module = LanguageModel(make_config())
    module.configure_model()
    poison(module, poisoned)
    with pytest.raises(RunError, match=rf"train loss is (nan|inf); first not finite: {blamed}"):
        run_step(module, [make_batch()])


def test_a_parameter_that_is_not_finite_is_named() -> None:
    module = LanguageModel(make_config())
    module.configure_model()
    with torch.no_grad():
        module.model.backbone.layers[1].mixer.A_log[0] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(RunError, match=r"first not finite: parameter backbone.layers.1.mixer.A_log"):
        run_step(module, [make_batch()])


def test_a_gradient_that_is_not_finite_is_named() -> None:
    class Overflowing(LanguageModel):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            super().on_before_optimizer_step(optimizer)
            self.model.backbone.layers[0].mixer.in_proj.weight.grad[0] = float("inf")  # type: ignore[union-attr]

    with pytest.raises(RunError, match=r"the gradient of backbone.layers.0.mixer.in_proj.weight"):
        run_step(Overflowing(make_config()), [make_batch()])


def test_a_validation_loss_that_is_not_finite_stops_too() -> None:
    class Broken(LanguageModel):
        def on_validation_start(self) -> None:
            poison(self, "model.backbone.layers.1.norm")

    with pytest.raises(RunError, match=r"val/loss is (nan|inf).*backbone.layers.1.norm"):
        run_step(Broken(make_config()), [make_batch()], [make_batch()])


def test_a_batch_without_any_loss_weight_is_refused() -> None:
    batch = make_batch()
    batch["loss_weight"].zero_()
    with pytest.raises(RunError, match="no token of the batch has a loss weight"):
        run_step(LanguageModel(make_config()), [batch])


def test_watching_leaves_no_hooks() -> None:
    module = LanguageModel(make_config())
    module.configure_model()
    with watch_forward(module.model) as found:
        module.model(torch.randint(256, (1, 5)))
    assert found == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.model.modules())


def test_the_summary_lists_what_decays_and_the_state() -> None:
    module = LanguageModel(make_config())
    module.configure_model()
    columns = [list(column.cells) for column in summarize(module).columns]
    rows = dict(zip(*columns, strict=True))
    assert rows["parameters"] == f"{sum(p.numel() for p in module.model.parameters()):,}"
    for name in ("A_log", "dt_bias", "mixer.D", "norm_f.weight", "conv1d.bias"):
        assert name in rows["not decayed"]
        assert name not in rows["decayed"]
    assert "embedding.weight" in rows["decayed"]
    # Two layers: 4 heads x 16 x 16 of SSM state, 96 channels x 3 tokens of convolution.
    assert state_elements(MODEL, Mitigation()) == (2 * 96 * 3, 2 * 4 * 16 * 16)

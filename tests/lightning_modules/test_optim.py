"""What weight decay pulls on, and the learning rate at every step."""

import pytest
import torch

from conf.schema import ModelConfig, OptimConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.optim import build_optimizer, build_schedule, lr_factor, parameter_groups


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("d_has_hdim", [True, False], ids=["D-per-channel", "D-per-head"])
def test_no_decay_on_dynamics_norms_and_biases(tied: bool, d_has_hdim: bool) -> None:
    model = Mamba2LM(ModelConfig(d_model=32, headdim=16, tie_embeddings=tied, d_has_hdim=d_has_hdim))
    decay, no_decay = parameter_groups(model, 0.1)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)
    layers = ("backbone.layers.0.", "backbone.layers.1.")
    assert set(no_decay["param_names"]) == {"backbone.norm_f.weight"} | {
        layer + name
        for layer in layers
        for name in (
            "norm.weight",
            "mixer.A_log",
            "mixer.D",
            "mixer.dt_bias",
            "mixer.conv1d.bias",
            "mixer.norm.weight",
        )
    }
    assert set(decay["param_names"]) == {"backbone.embedding.weight"} | (
        set() if tied else {"lm_head.weight"}
    ) | {
        layer + name
        for layer in layers
        for name in ("mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.out_proj.weight")
    }


def test_every_parameter_is_optimised_once() -> None:
    model = Mamba2LM(ModelConfig(d_model=32, headdim=16))
    optimizer = build_optimizer(model, OptimConfig())
    ours = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(ours) == len(set(ours))
    assert set(ours) == {id(p) for p in model.parameters()}


def test_warmup_stable_decay() -> None:
    config = OptimConfig(warmup_steps=4, decay_fraction=0.25, min_lr_ratio=0.2)
    factors = [lr_factor(step, config, max_steps=16) for step in range(16)]
    warmup, stable, decay = [0.25, 0.5, 0.75, 1.0], [1.0] * 8, [0.8, 0.6, 0.4, 0.2]
    assert factors == pytest.approx(warmup + stable + decay)


@pytest.mark.parametrize(
    ("warmup", "decay", "expected"),
    [(0, 0.0, [1, 1, 1, 1]), (8, 0.0, [0.125, 0.25, 0.375, 0.5]), (2, 1.0, [0.5, 0.5, 0.25, 0])],
    ids=["constant", "all-warmup", "overlap"],
)
def test_schedule_edges(warmup: int, decay: float, expected: list[float]) -> None:
    config = OptimConfig(warmup_steps=warmup, decay_fraction=decay)
    assert [lr_factor(step, config, 4) for step in range(4)] == pytest.approx(expected)


def test_the_scheduler_sets_the_rate_of_each_step() -> None:
    config = OptimConfig(lr=0.5, warmup_steps=2, decay_fraction=0.5)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), config)
    scheduler = build_schedule(optimizer, config, max_steps=4)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.25, 0.5, 0.25, 0.0])


def test_the_step_after_the_last_has_a_rate_too() -> None:
    # Schedulers are asked for it when training ends.
    assert lr_factor(1, OptimConfig(warmup_steps=0), max_steps=1) == 1.0
    assert lr_factor(100, OptimConfig(warmup_steps=0, min_lr_ratio=0.25), max_steps=100) == 0.25

"""Mamba-2's initialisation, and the names and shapes of the public checkpoints."""

import math

import pytest
import torch
import torch.nn.functional as F

from conf.schema import ModelConfig
from lightning_modules.backbone import Mamba2LM


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("d_has_hdim", [True, False])
def test_names_and_shapes_are_those_of_the_public_checkpoints(d_has_hdim: bool, tie_embeddings: bool) -> None:
    """state-spaces Mamba-2: exactly these keys in state_dict, the tied head included."""
    config = ModelConfig(
        d_model=24,
        n_layers=3,
        d_state=10,
        headdim=8,
        n_groups=2,
        d_conv=3,
        vocab_size=50,
        d_has_hdim=d_has_hdim,
        tie_embeddings=tie_embeddings,
    )
    d_inner, heads, channels = 48, 6, 48 + 2 * 2 * 10
    layer = {
        "norm.weight": (24,),
        "mixer.in_proj.weight": (d_inner + channels + heads, 24),
        "mixer.conv1d.weight": (channels, 1, 3),
        "mixer.conv1d.bias": (channels,),
        "mixer.dt_bias": (heads,),
        "mixer.A_log": (heads,),
        "mixer.D": (d_inner,) if d_has_hdim else (heads,),
        "mixer.norm.weight": (d_inner,),
        "mixer.out_proj.weight": (24, d_inner),
    }
    expected = {
        "backbone.embedding.weight": (50, 24),
        **{f"backbone.layers.{i}.{name}": shape for i in range(3) for name, shape in layer.items()},
        "backbone.norm_f.weight": (24,),
        "lm_head.weight": (50, 24),
    }
    model = Mamba2LM(config)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected
    tied = model.lm_head.weight is model.backbone.embedding.weight
    assert tied == tie_embeddings
    assert len(list(model.parameters())) == len(expected) - tied


def test_the_published_130m_shape() -> None:
    """The 24-layer public model has 128,989,632 parameters, head tied, vocabulary padded to 50,288."""
    config = ModelConfig(d_model=768, n_layers=24, d_state=128, headdim=64, vocab_size=50_288)
    with torch.device("meta"):
        model = Mamba2LM(config)
    assert model.state_dict()["backbone.layers.23.mixer.in_proj.weight"].shape == (3352, 768)
    assert sum(p.numel() for p in model.parameters()) == 128_989_632


@pytest.fixture(scope="module")
def model() -> Mamba2LM:
    torch.manual_seed(0)
    return Mamba2LM(ModelConfig(d_model=256, n_layers=9, d_state=16, headdim=4, vocab_size=999))


def per_layer(model: Mamba2LM, name: str) -> torch.Tensor:
    return torch.stack([value for key, value in model.state_dict().items() if key.endswith(name)])


def test_dt_is_log_uniform_in_its_range(model: Mamba2LM) -> None:
    """softplus(dt_bias) fills [0.001, 0.1] evenly in log scale."""
    dt = F.softplus(per_layer(model, "mixer.dt_bias").double())
    assert dt.min() >= 0.001 * (1 - 1e-4)
    assert dt.max() <= 0.1 * (1 + 1e-4)
    quartiles = dt.log().quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).double())
    expected = torch.linspace(math.log(0.001), math.log(0.1), 5).double()
    assert (quartiles - expected).abs().max() < 0.25


def test_dt_init_floor() -> None:
    config = ModelConfig(d_model=64, n_layers=1, headdim=2, dt_min=1e-6, dt_max=1e-2, dt_init_floor=1e-3)
    dt = F.softplus(per_layer(Mamba2LM(config), "mixer.dt_bias").double())
    assert dt.min() >= 1e-3 * (1 - 1e-4)
    assert (dt < 1.001e-3).double().mean() > 0.4  # log-uniform from 1e-6: three quarters lie at the floor
    assert dt.max() <= 1e-2 * (1 + 1e-4)


def test_A_is_uniform_in_its_range(model: Mamba2LM) -> None:
    A = per_layer(model, "mixer.A_log").exp()
    assert A.min() >= 1.0 - 1e-5
    assert A.max() <= 16.0 + 1e-5
    assert abs(A.mean().item() - 8.5) < 0.5
    narrow = ModelConfig(d_model=64, n_layers=1, headdim=2, A_init_range=(2.0, 3.0))
    A = per_layer(Mamba2LM(narrow), "mixer.A_log").exp()
    assert 2.0 - 1e-5 <= A.min() <= A.max() <= 3.0 + 1e-5


def test_D_and_norms_are_ones(model: Mamba2LM) -> None:
    weights = [
        v for k, v in model.state_dict().items() if k.endswith(("norm.weight", "norm_f.weight", "mixer.D"))
    ]
    assert len(weights) == 9 * 3 + 1
    assert all((w == 1).all() for w in weights)


def test_residual_branches_shrink_with_depth(model: Mamba2LM) -> None:
    """out_proj: uniform in +-1 / sqrt(d_inner), over sqrt(n_layers), so that residual sums keep size."""
    weight = per_layer(model, "mixer.out_proj.weight")
    bound = 1 / math.sqrt(512) / math.sqrt(9)
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    in_proj = per_layer(model, "mixer.in_proj.weight")
    assert in_proj.std().item() == pytest.approx(1 / math.sqrt(256) / math.sqrt(3), rel=0.01)


def test_embedding_has_its_standard_deviation(model: Mamba2LM) -> None:
    assert model.backbone.embedding.weight.std().item() == pytest.approx(0.02, rel=0.01)
    untied = ModelConfig(d_model=64, n_layers=1, vocab_size=999, init_std=0.1, tie_embeddings=False)
    other = Mamba2LM(untied)
    assert other.backbone.embedding.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert other.lm_head.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert not torch.equal(other.lm_head.weight, other.backbone.embedding.weight)


def test_seed_decides_everything() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(Mamba2LM(ModelConfig(d_model=16, headdim=8, d_state=4)).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])


def test_untrained_model_predicts_uniformly(model: Mamba2LM) -> None:
    """At initialisation the loss is log(vocabulary), and every parameter has a gradient."""
    ids = torch.randint(999, (2, 64))
    losses, _ = model.token_losses(ids, ids.roll(-1, 1))
    assert losses.mean().item() == pytest.approx(math.log(999), rel=0.03)
    grads = torch.autograd.grad(losses.mean(), list(model.parameters()))
    assert all(g.isfinite().all() and g.any() for g in grads)

"""The residual stream: a block's branch joins it in the norm of the next."""

import pytest
import torch
from torch import Tensor

from conf.schema import ModelConfig
from kernels.norm import rms_norm
from kernels.ssd import Mitigation
from lightning_modules.backbone import Mamba2LM
from lightning_modules.layer import Block
from lightning_modules.state import ModelState


@pytest.fixture
def model() -> Mamba2LM:
    torch.manual_seed(0)
    config = ModelConfig(d_model=32, n_layers=3, vocab_size=64, d_state=16, headdim=16)
    model = Mamba2LM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += torch.randn_like(parameter) / 5
    return model


def as_written(model: Mamba2LM, ids: Tensor) -> Tensor:
    """x + Mamba2(RMSNorm(x)) block after block, then the norm."""
    backbone, none = model.backbone, Mitigation()
    state = ModelState.zeros(model.config, len(ids), ids.device, torch.float32, none)
    x = backbone.embedding(ids)

    def norm(weight: Tensor) -> Tensor:
        return rms_norm(x, weight, eps=model.config.norm_eps)

    for block, layer in zip(backbone.layers, state.layers, strict=True):
        assert isinstance(block, Block)
        x = x + block.mixer(norm(block.norm.weight), layer, None, state.position, none)[0]
    return norm(backbone.norm_f.weight)


def test_equals_the_sums_as_written_bit_for_bit(model: Mamba2LM) -> None:
    """Hidden states and the gradient of every parameter that makes them."""
    ids, parameters = torch.randint(64, (2, 40)), list(model.backbone.parameters())
    ours, written = model.hidden(ids)[0], as_written(model, ids)
    assert torch.equal(ours, written)
    dy = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(t, parameters, dy) for t in (ours, written)), strict=True):
        assert torch.equal(a, b)


def test_stream_stays_in_fp32_under_autocast(model: Mamba2LM) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    for block in model.backbone.layers:
        block.register_forward_hook(lambda _, given, out: seen.append((out[0].dtype, out[1].dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        hidden, _ = model.hidden(torch.randint(64, (1, 8)))
    assert seen == 3 * [(torch.float32, torch.bfloat16)]
    assert hidden.dtype == torch.bfloat16

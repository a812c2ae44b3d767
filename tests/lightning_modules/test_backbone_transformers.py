"""The same weights give the same logits as transformers' Mamba-2: an independent reading of the architecture.

Names are equal but for `backbone.embeddings.weight` there, `backbone.embedding.weight` here and in the public
state-spaces checkpoints. Its gated norm multiplies by silu(z) first and normalises each group apart, as ours.
It has neither D per channel nor the norm before the gate; its single cached steps ignore time_step_limit.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM

from conf.schema import ModelConfig
from lightning_modules.backbone import Mamba2LM

INF = float("inf")
CASES: dict[str, dict[str, Any]] = {
    "one_group": {"d_model": 32, "headdim": 8, "d_state": 16},
    "groups": {"d_model": 32, "headdim": 8, "d_state": 12, "n_groups": 4},
    "untied": {"d_model": 24, "headdim": 16, "d_state": 5, "n_groups": 3, "tie_embeddings": False},
    "conv_3_expand_3": {"d_model": 16, "headdim": 4, "d_state": 8, "expand": 3, "n_groups": 2, "d_conv": 3},
    "dt_limit": {"d_model": 32, "headdim": 32, "d_state": 16, "dt_limit": (0.01, 0.06)},
    "deep": {"d_model": 16, "headdim": 16, "d_state": 8, "n_layers": 5},
}


def build_pair(sizes: dict[str, Any]) -> tuple[Mamba2LM, Mamba2ForCausalLM]:
    """Ours and theirs with the same weights, all of them away from their initial values."""
    config = ModelConfig(**{"n_layers": 2, "vocab_size": 30, "chunk_size": 16} | sizes)
    ours = Mamba2LM(config)
    theirs = Mamba2ForCausalLM(
        Mamba2Config(
            num_heads=config.n_heads,
            head_dim=config.headdim,
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            state_size=config.d_state,
            num_hidden_layers=config.n_layers,
            layer_norm_epsilon=config.norm_eps,
            expand=config.expand,
            conv_kernel=config.d_conv,
            n_groups=config.n_groups,
            time_step_limit=config.dt_limit,
            chunk_size=32,
            tie_word_embeddings=config.tie_embeddings,
        )
    )
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    renamed = {name.replace("embedding.", "embeddings."): value for name, value in ours.state_dict().items()}
    theirs.load_state_dict(renamed, strict=True)
    return ours, theirs.eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(30, (2, 75))


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES.keys())
def test_logits_and_gradients_agree(sizes: dict, ids: Tensor, check_close: Any) -> None:
    """1e-4 through the whole backbone and back to every parameter (measured: 7e-7, gradients 3e-5)."""
    ours, theirs = build_pair(sizes)
    logits, expected = ours(ids).logits, theirs(ids, use_cache=False).logits
    check_close(logits, expected, 1e-4, "logits")
    expected_grads = grads_by_name(theirs, expected, ids)
    largest = max(g.norm().item() for g in expected_grads.values())
    for name, actual in grads_by_name(ours, logits, ids).items():
        check_close(actual, expected_grads[name], 1e-4, name, floor=1e-2 * largest)


def grads_by_name(model: torch.nn.Module, logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters)
    return {n.replace("embeddings.", "embedding."): g for n, g in zip(names, grads, strict=True)}


@pytest.mark.parametrize("case", ["one_group", "groups"])
def test_states_agree_through_prefill_and_single_steps(case: str, ids: Tensor, check_close: Any) -> None:
    """The carried state holds what their cache holds: SSM states, and the last inputs of the convolution."""
    ours, theirs = build_pair(CASES[case])
    with torch.no_grad():
        expected = theirs(ids[:, :40], use_cache=True)
        out = ours(ids[:, :40])
        for t in range(40, 44):
            expected = theirs(ids[:, t : t + 1], cache_params=expected.cache_params, use_cache=True)
            out = ours(ids[:, t : t + 1], out.state)
            check_close(out.logits, expected.logits, 1e-4, f"logits of token {t}")
    for i, layer in enumerate(out.state.layers):
        ssm = expected.cache_params.get_recurrent_state(i, state_idx=0)
        check_close(layer.ssm, ssm, 1e-4, f"layer {i} ssm")
        conv = expected.cache_params.get_conv_state(i, state_idx=0)
        check_close(layer.conv, conv[..., -layer.conv.shape[-1] :], 1e-4, f"layer {i} conv")

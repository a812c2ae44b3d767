"""Checkpoints with random weights in every layout, written without the code under test."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.utils import logging

from conf.schema import ModelConfig

CASES: dict[str, dict[str, Any]] = {
    "one_group": {"d_model": 32, "headdim": 8, "d_state": 16},
    "groups": {"d_model": 32, "headdim": 8, "d_state": 12, "n_groups": 4},
    "untied": {"d_model": 24, "headdim": 16, "d_state": 5, "n_groups": 3, "tie_embeddings": False},
    "conv_3_expand_3": {"d_model": 16, "headdim": 4, "d_state": 8, "expand": 3, "n_groups": 2, "d_conv": 3},
    "dt_limit": {"d_model": 32, "headdim": 32, "d_state": 16, "dt_limit": (0.01, 0.06)},
    "dt_floor": {"d_model": 16, "headdim": 8, "d_state": 4, "dt_limit": (0.02, float("inf"))},
    "deep": {"d_model": 16, "headdim": 16, "d_state": 8, "n_layers": 5, "tie_embeddings": False},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def config_of(sizes: dict[str, Any]) -> ModelConfig:
    return ModelConfig(**{"n_layers": 2, "vocab_size": 48, "chunk_size": 16} | sizes)


def write_hf(folder: Path, config: ModelConfig, dtype: torch.dtype, shard: str = "5GB") -> Mamba2ForCausalLM:
    """A directory as transformers saves it, every weight away from its initial value."""
    model = Mamba2ForCausalLM(
        Mamba2Config(
            num_heads=config.n_heads,
            head_dim=config.headdim,
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            state_size=config.d_state,
            num_hidden_layers=config.n_layers,
            expand=config.expand,
            conv_kernel=config.d_conv,
            n_groups=config.n_groups,
            time_step_limit=config.dt_limit,
            chunk_size=config.chunk_size,
            tie_word_embeddings=config.tie_embeddings,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model = model.to(dtype).eval()
    logging.disable_progress_bar()  # it would stand among the lines that a test counts
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def state_spaces_weights(
    config: ModelConfig, dtype: torch.dtype, rows: int | None = None
) -> dict[str, Tensor]:
    """The names and shapes of the public checkpoints, written out one by one."""
    inner, heads = config.expand * config.d_model, config.expand * config.d_model // config.headdim
    conv = inner + 2 * config.n_groups * config.d_state
    weights = {"backbone.embedding.weight": torch.randn(rows or config.vocab_size, config.d_model)}
    for i in range(config.n_layers):
        mixer = f"backbone.layers.{i}.mixer"
        weights |= {
            f"{mixer}.dt_bias": torch.randn(heads) - 3,
            f"{mixer}.A_log": torch.rand(heads) * 2.5,
            f"{mixer}.D": torch.randn(inner if config.d_has_hdim else heads),
            f"{mixer}.in_proj.weight": torch.randn(inner + conv + heads, config.d_model)
            / config.d_model**0.5,
            f"{mixer}.conv1d.weight": torch.randn(conv, 1, config.d_conv) / 2,
            f"{mixer}.conv1d.bias": torch.randn(conv) / 5,
            f"{mixer}.norm.weight": 1 + torch.randn(inner) / 5,
            f"{mixer}.out_proj.weight": torch.randn(config.d_model, inner) / inner**0.5,
            f"backbone.layers.{i}.norm.weight": 1 + torch.randn(config.d_model) / 5,
        }
    weights["backbone.norm_f.weight"] = 1 + torch.randn(config.d_model) / 5
    weights = {name: value.to(dtype) for name, value in weights.items()}
    head = torch.randn(weights["backbone.embedding.weight"].shape).to(dtype)
    weights["lm_head.weight"] = weights["backbone.embedding.weight"] if config.tie_embeddings else head
    return weights


def write_state_spaces(
    folder: Path, config: ModelConfig, dtype: torch.dtype, tokens: int | None = None, **settings: Any
) -> dict[str, Tensor]:
    """A directory like the public ones; `tokens` of the vocabulary, padded to a multiple of 16."""
    folder.mkdir(parents=True)
    rows = None if tokens is None else -(-tokens // 16) * 16
    weights = state_spaces_weights(config, dtype, rows)
    ssm = {"layer": "Mamba2", "d_state": config.d_state, "headdim": config.headdim, "expand": config.expand}
    ssm |= {"ngroups": config.n_groups, "d_conv": config.d_conv, "dt_limit": list(config.dt_limit)}
    ssm |= {"D_has_hdim": config.d_has_hdim, "norm_before_gate": config.norm_before_gate}
    contents = {
        "d_model": config.d_model,
        "d_intermediate": 0,
        "n_layer": config.n_layers,
        "vocab_size": tokens or config.vocab_size,
        "ssm_cfg": ssm,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": config.tie_embeddings,
    }
    (folder / "config.json").write_text(json.dumps(contents | settings))
    torch.save(weights, folder / "pytorch_model.bin")
    return weights


def require_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bytes."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert actual[name].shape == value.shape, name
        as_bytes = (t.contiguous().reshape(-1).view(torch.uint8) for t in (actual[name], value))
        assert torch.equal(*as_bytes), name

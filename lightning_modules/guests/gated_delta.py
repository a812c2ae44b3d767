"""Gated DeltaNet in Qwen3-Next (`qwen3_next`), beside layers of attention, whose caches grow with the length.

Its state is keys by values. It has no step: in its place stands beta, the share of a key's old value that a
token replaces. insertion is the size of what is written, beta * |v| (keys have norm 1), not of what it
replaces.
"""

from typing import Any

import torch

from lightning_modules.guests.cached import CachedFamily
from lightning_modules.guests.guest import GuestConfig, Trace


class GatedDelta(CachedFamily):
    functions = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
    argument = "past_key_values"
    conv_kernel = "linear_conv_kernel_dim"

    def config(self, theirs: Any) -> GuestConfig:
        names = [f"model.layers.{i}.linear_attn" for i in self.recurrent(theirs)]
        return GuestConfig(
            family=theirs.model_type,
            d_model=theirs.hidden_size,
            n_layers=len(names),
            d_state=theirs.linear_value_head_dim,
            headdim=theirs.linear_key_head_dim,
            heads=theirs.linear_num_value_heads,
            n_groups=theirs.linear_num_key_heads,
            d_conv=theirs.linear_conv_kernel_dim,
            chunk_size=64,
            vocab_size=theirs.vocab_size,
            tie_embeddings=theirs.tie_word_embeddings,
            layer_names=names,
        )

    def trace(self, function: str, *args: Any, **options: Any) -> Trace:
        value, beta = args[2].float(), options["beta"].float()
        written = beta * torch.linalg.vector_norm(value, dim=-1)
        return Trace(beta, options["g"].float(), written)

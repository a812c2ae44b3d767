"""RWKV-4 (`rwkv`): a decaying sum of values and one of weights a channel, which is a head here.

Both are kept with a common exponent; its state is what they stand for, (sum of values, sum of weights). The
decay is a parameter: the same at every token. It has no step, which counts as 1.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lightning_modules.guests.guest import Family, GuestConfig, GuestState, Layers, Trace

CARRIED = 5  # of all layers: inputs of the feed-forward and of the attention, values, weights, exponent
NEVER = -1e30  # exponent before the first token


@contextmanager
def without_downloaded_kernels() -> Iterator[None]:
    """A model made within the block runs what is installed here.

    Where there is a GPU, transformers fetches a compiled kernel for `rwkv` from the hub, which also refuses
    segments longer than the model's training length.
    """
    from transformers.models.rwkv import modeling_rwkv

    with mock.patch.object(modeling_rwkv, "is_ninja_available", return_value=False):
        yield


class Rwkv(Family):
    functions = ("rwkv_linear_attention",)
    single_tokens_by_row = True  # transformers broadcasts one token's shifted input over the rows

    def config(self, theirs: Any) -> GuestConfig:
        if theirs.attention_hidden_size != theirs.hidden_size:
            raise ValueError(
                f"attention_hidden_size={theirs.attention_hidden_size}: transformers carries states of "
                f"hidden_size={theirs.hidden_size} channels alone: such a model cannot be read in pieces"
            )
        return GuestConfig(
            family=theirs.model_type,
            d_model=theirs.hidden_size,
            n_layers=theirs.num_hidden_layers,
            d_state=2,
            headdim=1,
            heads=theirs.attention_hidden_size,
            expand=1,
            d_conv=2,  # the token before
            chunk_size=16,
            vocab_size=theirs.vocab_size,
            tie_embeddings=theirs.tie_word_embeddings,
            layer_names=[f"rwkv.blocks.{i}.attention" for i in range(theirs.num_hidden_layers)],
            head_names="channel",
        )

    def arguments(self, theirs: Any, state: GuestState | None, ids: Tensor) -> dict[str, Any]:
        # The model writes into what it is given.
        if state is not None:
            return {"state": [t.clone() for t in state.layers[0]]}
        shape = (len(ids), theirs.hidden_size, theirs.num_hidden_layers)
        zeros = [torch.zeros(shape, device=ids.device) for _ in range(CARRIED)]
        zeros[-1] += NEVER
        return {"state": zeros}

    def layers(self, arguments: dict[str, Any]) -> Layers:
        return (tuple(arguments["state"]),)

    def states(self, theirs: Any, layers: Layers) -> list[Tensor]:
        _, _, values, weights, exponent = (t.float() for t in layers[0])
        sums = torch.stack([values, weights], -1) * exponent.exp()[..., None]  # (B, channels, layers, 2)
        return [sums[:, :, i].unsqueeze(2) for i in range(theirs.num_hidden_layers)]

    def trace(self, function: str, *args: Any, **options: Any) -> Trace:
        decay, _, key, value = args[:4]
        weight = key.float().exp()
        written = weight * (1 + value.float().square()).sqrt()
        log_decay = -decay.float().exp().expand_as(weight)
        return Trace(torch.ones_like(weight), log_decay, written)

"""Families whose state transformers keeps in its Cache: a convolution's inputs, a recurrent state a layer.

Layers of attention among them carry their keys and values, which grow with the length.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.guests.guest import Family, GuestState, Layers


class CachedFamily(Family):
    """argument: the name under which the model takes its cache."""

    argument = "cache_params"
    conv_kernel = "conv_kernel"  # in the config

    def arguments(self, theirs: Any, state: GuestState | None, ids: Tensor) -> dict[str, Any]:
        from transformers import DynamicCache

        cache = DynamicCache(config=theirs)
        if state is not None:
            # Each copies what it is given: the state handed in stays as it is.
            for number, tensors in enumerate(state.layers):
                if number in self.recurrent(theirs):
                    cache.update_conv_state(
                        tensors[0], number, conv_kernel_size=getattr(theirs, self.conv_kernel)
                    )
                    cache.update_recurrent_state(tensors[1], number)
                else:
                    cache.update(tensors[0], tensors[1], number)
        return {self.argument: cache}

    def layers(self, arguments: dict[str, Any]) -> Layers:
        held = []
        for layer in arguments[self.argument].layers:
            if hasattr(layer, "recurrent_states"):
                held.append((layer.conv_states[0], layer.recurrent_states[0]))
            else:
                held.append((layer.keys, layer.values))
        return tuple(held)

    def states(self, theirs: Any, layers: Layers) -> list[Tensor]:
        return [self.by_head(layers[number][1]).to(torch.float32) for number in self.recurrent(theirs)]

    def recurrent(self, theirs: Any) -> list[int]:
        """Numbers of the layers that carry a recurrent state."""
        return [i for i, kind in enumerate(theirs.layer_types) if kind == "linear_attention"]

    def by_head(self, state: Tensor) -> Tensor:
        """A layer's recurrent state as (B, H, P, N)."""
        return state

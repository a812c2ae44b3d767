"""Mamba-2 as transformers runs it (`mamba2`), with biases too, which our own model does not have.

transformers keeps dt within its limits in a segment of several tokens and not in a single one: here in both.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.guests.cached import CachedFamily
from lightning_modules.guests.guest import GuestConfig, Trace

SCAN, STEP = "mamba2_chunk_scan", "mamba2_selective_state_update"


class Mamba2Guest(CachedFamily):
    functions = (SCAN, STEP)

    def config(self, theirs: Any) -> GuestConfig:
        self.limits = tuple(map(float, theirs.time_step_limit))
        self.corrects = self.limits != (0.0, math.inf)
        names = [f"backbone.layers.{i}.mixer" for i in self.recurrent(theirs)]
        return GuestConfig(
            family=theirs.model_type,
            d_model=theirs.hidden_size,
            n_layers=len(names),
            d_state=theirs.state_size,
            headdim=theirs.head_dim,
            heads=theirs.num_heads,
            expand=int(theirs.expand),
            n_groups=theirs.n_groups,
            d_conv=theirs.conv_kernel,
            chunk_size=theirs.chunk_size,
            vocab_size=theirs.vocab_size,
            tie_embeddings=theirs.tie_word_embeddings,
            layer_names=names,
        )

    def call(
        self,
        original: Callable[..., Any],
        function: str,
        before: Tensor | None,
        /,
        *args: Any,
        **options: Any,
    ) -> Any:
        if function == STEP and self.corrects:
            dt = F.softplus(args[2].float() + options["dt_bias"].float()).clamp(*self.limits)
            args = (*args[:2], dt.to(args[2].dtype), *args[3:])
            options |= {"dt_bias": None, "dt_softplus": False}
        return original(*args, **options)

    def trace(self, function: str, *args: Any, **options: Any) -> Trace:
        if function == STEP:  # one token, everything spread over channels
            _, x, dt, A, B = args[:5]
            x, dt, A, B = x[:, None], dt[:, None, :, 0], A[:, 0, 0], B[:, None]
            bias = options["dt_bias"][:, 0]
        else:
            x, dt, A, B = args[:4]
            bias = options["dt_bias"]
        dt = F.softplus(dt.float() + bias.float()).clamp(*self.limits)  # (B, T, H)
        x_norm, B_norm = (torch.linalg.vector_norm(t.float(), dim=-1) for t in (x, B))
        written = dt * x_norm * B_norm.repeat_interleave(x.shape[2] // B.shape[2], 2)
        return Trace(dt, dt * A.float(), written)

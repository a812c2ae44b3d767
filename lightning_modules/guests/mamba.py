"""Mamba (`mamba`) and Falcon Mamba (`falcon_mamba`): each channel decays at N rates; a head is a channel.

transformers reads a segment of several tokens as if nothing came before: it keeps the convolution's inputs
and forgets the state. The scan is linear in the state, so what it adds is added here, exactly.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.guests.cached import CachedFamily
from lightning_modules.guests.guest import GuestConfig, Trace

SCAN, STEP = "mamba_selective_scan", "mamba_selective_state_update"


PIECE = 64  # tokens of which the states' share is held at a time


class Mamba(CachedFamily):
    functions = (SCAN, STEP)
    corrects = True

    def config(self, theirs: Any) -> GuestConfig:
        names = [f"backbone.layers.{i}.mixer" for i in self.recurrent(theirs)]
        return GuestConfig(
            family=theirs.model_type,
            d_model=theirs.hidden_size,
            n_layers=len(names),
            d_state=theirs.state_size,
            headdim=1,
            heads=theirs.intermediate_size,
            expand=theirs.expand,
            d_conv=theirs.conv_kernel,
            chunk_size=16,
            vocab_size=theirs.vocab_size,
            tie_embeddings=theirs.tie_word_embeddings,
            layer_names=names,
            head_names="channel",
        )

    def by_head(self, state: Tensor) -> Tensor:
        return state.unsqueeze(2)  # (B, channels, 1, N)

    def call(
        self,
        original: Callable[..., Any],
        function: str,
        before: Tensor | None,
        /,
        *args: Any,
        **options: Any,
    ) -> Any:
        result = original(*args, **options)
        if function == STEP or before is None:
            return result
        (y, last), state = result, before[:, :, 0]  # (B, channels, T), (B, channels, N)
        _, dt, A, _, C = args[:5]
        elapsed = F.softplus(dt.float() + options["delta_bias"].float()[:, None]).cumsum(2)
        shares = []
        for some, read in zip(elapsed.split(PIECE, 2), C.float().split(PIECE, 2), strict=True):
            left = state[:, :, None] * (some[..., None] * A[:, None]).exp()  # (B, channels, t, N)
            shares.append(torch.einsum("bctn,bnt->bct", left, read))
        y = y + (torch.cat(shares, 2) * F.silu(options["z"].float())).to(y.dtype)
        return y, last + (state * (elapsed[:, :, -1:] * A).exp()).to(last.dtype)

    def trace(self, function: str, *args: Any, **options: Any) -> Trace:
        if function == STEP:  # one token: no axis of time
            _, x, dt, A, B = args[:5]
            x, dt, B, bias = x[..., None], dt[..., None], B[..., None], options["dt_bias"]
        else:
            x, dt, A, B = args[:4]
            bias = options["delta_bias"]
        dt = F.softplus(dt.float() + bias.float()[:, None])  # (B, channels, T)
        written = dt * x.float().abs() * torch.linalg.vector_norm(B.float(), dim=1, keepdim=True)
        log_decay = dt * A.float().mean(1)[:, None]
        return Trace(*(t.transpose(1, 2) for t in (dt, log_decay, written)))

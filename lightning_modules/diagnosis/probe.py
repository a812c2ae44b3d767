"""Reads along while a model runs: states at a stride, and what each head does to them in between.

The model's own code path stays as it is. A probe stands between a layer and `ssd_scan`: it passes every
argument on, asks for the states at its stride, and hands back what the scan returned.

    probe = StateProbe(model)
    with probe.attached():
        probe.stride = 1024
        ...run the model in segments of whole strides, or of parts of one...
        measured = probe.take()
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.ssd import Window, ssd_scan
from kernels.ssd.discretize import discretize
from kernels.ssd.heads import spread
from lightning_modules.backbone import Mamba2LM
from lightning_modules.diagnosis.statistics import STATE_MEASURES, state_measures
from lightning_modules.guests.guest import Guest
from lightning_modules.layer import scanning_with

# By head, at each sample: of the state there, then means over the tokens since the sample before. log_decay
# is the logarithm of the retention; insertion the Frobenius norm of what a token adds, w_t x_t B_t^T.
TOKEN_MEASURES = ("dt", "log_decay", "insertion")
# log_retention: of the first token, the sum of log decays of all tokens after it.
MEASURES = (*STATE_MEASURES, *TOKEN_MEASURES, "log_retention")

NORMS = 128  # tokens of a stride, at most about, whose insertion is measured: norms read all of x

Values = dict[str, NDArray[np.float64]]


@dataclass
class _Layer:
    """Notes on one layer."""

    open: Tensor  # (3, H) float64: sums of the token measures since the last sample
    tokens: int = 0  # in these sums
    log_retention: Tensor | None = None  # (H,) float64, up to the last sample
    samples: list[Tensor] = field(default_factory=list)  # (measures, n, H) each
    channels: Tensor | None = None  # (H, P, N): `channel_energy` at the last sample


class StateProbe:
    """Measures every layer and head of a model at a stride; means over the rows of the batch.

    Args:
        top_share: share of a head's P x N channels that count as its top ones.
    """

    def __init__(self, model: Mamba2LM | Guest, top_share: float = 0.01) -> None:
        self.model: Any = model
        self.top_share = top_share
        self.stride = 1024
        heads, device = model.config.n_heads, model.lm_head.weight.device
        self._layers = [
            _Layer(torch.zeros(len(TOKEN_MEASURES), heads, dtype=torch.float64, device=device))
            for _ in range(model.config.n_layers)
        ]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block, every forward pass of the model is measured, one continuing the other."""
        mixers: list[Any] = [layer.mixer for layer in self.model.backbone.layers]
        with scanning_with(mixers, (partial(self._scan, notes) for notes in self._layers)):
            yield

    def take(self) -> Values:
        """The samples since the last call: measure -> (n, layers, heads), in the order of positions."""
        layers = [torch.cat(notes.samples, 1) for notes in self._layers if notes.samples]
        for notes in self._layers:
            notes.samples = []
        if not layers:
            shape = (len(MEASURES), 0, len(self._layers), self.model.config.n_heads)
            return dict(zip(MEASURES, np.zeros(shape), strict=True))
        values = torch.stack(layers, 2).double().cpu().numpy()
        return dict(zip(MEASURES, values, strict=True))

    def channels(self) -> list[Tensor]:
        """Of every layer, each channel's squared deviation from the mean of its head's state at the last
        sample: (H, P, N)."""
        return [notes.channels for notes in self._layers if notes.channels is not None]

    def _scan(
        self, notes: _Layer, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any
    ) -> tuple[Tensor, Any]:
        length, left = x.shape[1], self.stride - notes.tokens
        due = (notes.tokens + length) // self.stride
        assert notes.tokens == 0 or length <= left, "a segment must hold whole strides or lie within one"
        states: Tensor | None = None
        if due and (length > left or isinstance(options["initial_state"], Window)):
            y, final, states = ssd_scan(x, dt, A, B, C, states_every=left, **options)
        else:
            y, final = ssd_scan(x, dt, A, B, C, **options)
            states = final[:, None] if due else None  # a segment that ends on a sample has it already
        tokens = self._token_measures(x, dt, A, B, options)
        self._note(notes, tokens, states, due)
        return y, final

    def _token_measures(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, options: dict[str, Any]) -> Tensor:
        """(3, T, H) fp32, means over rows. Of insertion some tokens stand for those after them."""
        rule = spread(options["mitigation"], len(A), A.device)
        softplus, limit = options["dt_softplus"], options["dt_limit"]
        log_decay, insert = discretize(dt, A, options["dt_bias"], softplus, limit, rule)
        some = self.stride // NORMS | 1  # odd: prompts that repeat mostly do so at even periods
        x_norm, B_norm = (torch.linalg.vector_norm(t[:, ::some], dim=-1, dtype=torch.float32) for t in (x, B))
        norm = (x_norm.unflatten(2, (B.shape[2], -1)) * B_norm[..., None]).flatten(2)
        insertion = (insert[:, ::some] * norm).repeat_interleave(some, 1)[:, : x.shape[1]]
        dt = (insert / rule.insert_scale).float()
        return torch.stack([dt, log_decay, insertion]).mean(1)

    def _note(self, notes: _Layer, tokens: Tensor, states: Tensor | None, due: int) -> None:
        if notes.log_retention is None:  # the first token is not forgotten by itself
            notes.log_retention = -tokens[1, 0].double()
        length = tokens.shape[1]
        if states is None:
            notes.open += tokens.sum(1)
            notes.tokens += length
            return
        whole = due * self.stride - notes.tokens
        sums = tokens[:, :whole].unflatten(1, (due, -1)).sum(2, dtype=torch.float64)  # (3, due, H)
        sums[:, 0] += notes.open
        log_retention = notes.log_retention + sums[1].cumsum(0)
        measured, energy = state_measures(states, self.top_share)
        notes.samples.append(torch.cat([measured, sums / self.stride, log_retention[None]]))
        notes.channels = energy[-1]
        notes.log_retention = log_retention[-1]
        notes.open = tokens[:, whole:].sum(1, dtype=torch.float64)
        notes.tokens = length - whole

"""The probe of a guest: what StateProbe measures of our own model, from what the guest's layers do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbone import Mamba2LM
from lightning_modules.diagnosis.probe import StateProbe
from lightning_modules.guests.guest import Guest, Trace


class GuestProbe(StateProbe):
    """The guest reads in pieces that end at a stride at most: states are known at their ends alone."""

    def __init__(self, model: Guest, top_share: float = 0.01) -> None:
        super().__init__(model, top_share)
        self.guest = model

    @contextmanager
    def attached(self) -> Iterator[None]:
        self.guest.listener, self.guest.next_piece = self._hear, self._until_next_sample
        try:
            yield
        finally:
            self.guest.listener = None

    def _until_next_sample(self, length: int) -> int:
        return min(length, self.stride - self._layers[0].tokens)

    def _hear(self, traces: list[Trace], states: list[Tensor]) -> None:
        for notes, trace, state in zip(self._layers, traces, states, strict=True):
            due = (notes.tokens + trace.dt.shape[1]) // self.stride
            measured = torch.stack([t.float() for t in trace]).mean(1)
            self._note(notes, measured, state[:, None] if due else None, due)


def probe_of(model: Mamba2LM | Guest, *args: Any) -> StateProbe:
    """The probe of our own model or of a guest."""
    return GuestProbe(model, *args) if isinstance(model, Guest) else StateProbe(model, *args)

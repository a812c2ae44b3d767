"""initial_state.name=carried: truncated backpropagation through time, rows going on from step to step."""

from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from conf.schema import TrainConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.initial_state import Batch, InitialState, Rows
from lightning_modules.mitigations import AnyMitigation
from lightning_modules.state import ModelState
from lightning_modules.step_rows import gather_rows, own_rows


@dataclass
class Reader:
    """How far the rows of one micro-batch are: `state` stands before the first of the `past` segments."""

    state: ModelState
    past: list[Batch] = field(default_factory=list)  # ids, document_starts and reset of each


class Carried(InitialState):
    """Every row begins with its own final state of the step before: SSM state, convolution inputs and count.

    The loss of a step is that of its own segment; its gradient runs back through the last k = bptt_segments
    segments, this one included, and stops at the state before them: BPTT(k T; T) of Williams and Peng (1990),
    doi 10.1162/neco.1990.2.4.490. That gradient is exact: with k > 1 the k - 1 segments before are read again
    with today's weights, from the state that stood before them, and recomputed in the backward pass. Time
    grows k-fold, memory by the ids and one state a segment.

    A document's first token zeroes its row, wherever it stands. Passkey prompts have no such token: a row is
    one prompt after another, and where a curriculum's rows end, those of the next length begin at zero.
    """

    def __init__(self, config: TrainConfig, mitigation: AnyMitigation) -> None:
        super().__init__(config, mitigation)
        self.segments = config.initial_state.bptt_segments
        self.readers: dict[int, Reader] = {}  # by number of the micro-batch
        self._borders: list[ModelState] = []  # after each past segment of the micro-batch at work
        self._reset: Tensor

    def begin(self, model: Mamba2LM, batch: Batch, rows: Rows) -> ModelState:
        device = batch["ids"].device
        batch.setdefault("document_starts", torch.zeros_like(batch["ids"], dtype=torch.bool))
        reader = self.readers.get(rows.part)
        if reader is None or reader.state.batch_size != rows.count:
            reader = self.readers[rows.part] = Reader(self.zeros(rows.count, device))
        state = reader.state.to(device)
        for segment in reader.past:
            segment = {name: value.to(device) for name, value in segment.items()}
            state = advance(model, segment, state, self.mitigation)
            self._borders.append(state)
        self._reset = self.resets(rows, device)
        return state.zero_rows(self._reset)

    def end(self, batch: Batch, rows: Rows, final: ModelState) -> None:
        reader = self.readers[rows.part]
        reader.past.append(
            {"ids": batch["ids"], "document_starts": batch["document_starts"], "reset": self._reset}
        )
        if len(reader.past) == self.segments:
            first_border = [*self._borders, final][0]
            self.readers[rows.part] = Reader(first_border.detach(), reader.past[1:])
        self._borders = []

    def state_dict(self, trainer: pl.Trainer) -> dict[str, Any]:
        readers = [reader for _, reader in sorted(self.readers.items())]
        segments = zip(*(reader.past for reader in readers), strict=True)
        return {
            "states": self.save_states([reader.state for reader in readers], trainer),
            "past": [
                {name: gather_rows([part[name] for part in parts], trainer) for name in parts[0]}
                for parts in segments
            ],
        }

    def load_state_dict(self, saved: dict[str, Any], trainer: pl.Trainer) -> None:
        states = self.load_states(saved["states"], trainer)
        self.readers = {part: Reader(state) for part, state in enumerate(states)}
        for segment in saved["past"]:
            shares = {name: own_rows(value, trainer) for name, value in segment.items()}
            for part, reader in self.readers.items():
                reader.past.append({name: share[part] for name, share in shares.items()})


def advance(model: Mamba2LM, segment: Batch, state: ModelState, mitigation: AnyMitigation) -> ModelState:
    """The state after `segment`: ids (B, T), document_starts (B, T), and reset (B,) before its first token.

    Differentiable in weights and state. Nothing but ids and states is kept: the backward pass reads it again.
    """

    def read(state: ModelState) -> ModelState:
        starts = segment["document_starts"]
        state = state.zero_rows(segment["reset"])
        return model.hidden(segment["ids"], state, document_starts=starts, mitigation=mitigation)[1]

    return checkpoint(read, state, use_reentrant=False, preserve_rng_state=False)

"""One prompt streamed through a model: loss by position, and every head's state and updates at a stride."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_modules.diagnosis.probe import MEASURES, StateProbe, Values
from lightning_modules.evaluation.loss import bucketed
from lightning_modules.evaluation.streaming import AnyState, Reader, Source

SAMPLES_INSIDE = 32  # at least so many within the training length
SAMPLES = 256  # about so many over the whole prompt, without a setting


@dataclass(frozen=True)
class NonFinite:
    """The first state that was NaN or infinite; position: of the sample that saw it, in tokens."""

    layer: int
    head: int
    position: int


@dataclass(frozen=True)
class Measures:
    """What was read of a prompt.

    positions: (n,) int64, tokens before each sample, ascending; values: measure -> (n, layers, heads), see
    `diagnosis.probe`. loss: as `evaluation.loss.bucketed`. channels_inside, channels_end: a layer's (H, P, N)
    squared deviations at the last sample within the training length, and at the last of all.
    """

    train_length: int
    positions: NDArray[np.int64]
    values: Values
    loss: dict[str, Any]
    channels_inside: list[NDArray[np.float32]]
    channels_end: list[NDArray[np.float32]]
    non_finite: NonFinite | None

    @property
    def inside(self) -> NDArray[np.bool_]:
        """Which samples lie within the training length."""
        return self.positions <= self.train_length


def strides(train_length: int, length: int, stride: int | None) -> tuple[int, int]:
    """Tokens between samples within the training length and beyond it.

    Within it at least SAMPLES_INSIDE are taken: the norm by which what follows is judged. Without a setting
    the number of samples is bounded whatever the length, and so is memory.
    """
    inside = max(1, train_length // SAMPLES_INSIDE)
    beyond = stride or max(inside, length // SAMPLES)
    return min(inside, beyond), beyond


def read_prompt(
    reader: Reader,
    probe: StateProbe,
    source: Source,
    *,
    train_length: int,
    length: int,
    stride: int | None,
    bucket: int,
) -> Measures:
    """Stream `length` tokens through the model of `reader`; the source must hold one more.

    Reading ends behind the first segment whose states are not finite; what is kept ends before them.
    """
    fine, coarse = strides(train_length, length, stride)
    border = train_length // fine * fine
    reading = _Reading(reader, probe, source, border // fine + (length - border) // coarse)
    channels: list[list[Tensor]] = []

    def losses() -> Iterator[tuple[int, Tensor]]:
        for begin, end, step in ((0, border, fine), (border, length, coarse)):
            yield from reading.read(begin, end, step)
            channels.append(reading.channels)

    with probe.attached():
        loss = bucketed(losses(), length, bucket)
    taken = slice(reading.count)
    return Measures(
        train_length=train_length,
        positions=reading.positions[taken],
        values={name: values[taken] for name, values in reading.values.items()},
        loss=loss,
        channels_inside=[energy.cpu().numpy() for energy in channels[0]],
        channels_end=[energy.cpu().numpy() for energy in channels[-1]],
        non_finite=reading.non_finite,
    )


class _Reading:
    """Reads a prompt part by part and keeps what the probe finds.

    In arrays made beforehand: small ones that outlive their segment would lie between its large tensors, and
    the heap would grow with the length though hardly anything is held.
    """

    def __init__(self, reader: Reader, probe: StateProbe, source: Source, samples: int) -> None:
        self.reader, self.probe, self.source = reader, probe, source
        shape = (samples, probe.model.config.n_layers, probe.model.config.n_heads)
        self.values: Values = {name: np.zeros(shape) for name in MEASURES}
        self.positions = np.zeros(samples, np.int64)
        self.count = 0
        self.channels: list[Tensor] = []
        self.non_finite: NonFinite | None = None
        self._state: AnyState | None = None

    def read(self, begin: int, end: int, stride: int) -> Iterator[tuple[int, Tensor]]:
        """Losses of tokens begin + 1 .. end, sampled every `stride` tokens from `begin`."""
        if self.non_finite is not None:
            return
        self.probe.stride, position = stride, begin
        segments = self.reader.losses_from(self.source, self._state, begin, end, stride)
        for first, losses, state in segments:
            yield first, losses
            self._state = state
            taken = self.probe.take()
            positions = position + stride * np.arange(1, len(taken["rms"]) + 1)
            position = int(positions[-1]) if len(positions) else position
            self.non_finite = _first_non_finite(positions, taken)
            if self.non_finite is not None:
                self._keep(positions, taken, positions < self.non_finite.position)
                return
            self._keep(positions, taken, np.ones(len(positions), bool))
            self.channels = self.probe.channels()

    def _keep(self, positions: NDArray[np.int64], taken: Values, finite: NDArray[np.bool_]) -> None:
        end = self.count + int(finite.sum())
        self.positions[self.count : end] = positions[finite]
        for name, values in taken.items():
            self.values[name][self.count : end] = values[finite]
        self.count = end


def _first_non_finite(positions: NDArray[np.int64], values: Values) -> NonFinite | None:
    bad = np.argwhere(~np.isfinite(values["rms"]))
    if len(bad) == 0:
        return None
    # Of one sample the lowest layer: it spoils those above it.
    sample, layer, head = (int(i) for i in bad[0])
    return NonFinite(layer=layer, head=head, position=int(positions[sample]))

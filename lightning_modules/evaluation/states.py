"""The states suite: how far each head's state grows beyond training, and what it keeps of the first token."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from conf.diagnosis import ThresholdsConfig
from conf.measure_schema import EvaluateConfig
from conf.schema import DataConfig
from data.tokenizers import Tokenizer
from lightning_modules.diagnosis.heads import head_rows
from lightning_modules.diagnosis.prompts import filler_source
from lightning_modules.diagnosis.reading import read_prompt
from lightning_modules.evaluation.loss import held_out_text
from lightning_modules.evaluation.streaming import Reader, Source
from lightning_modules.guests.probe import probe_of

FACTOR = 16  # training lengths read, without a setting
KEPT = ("layer", "head", "rms_inside", "rms_beyond", "retention", "half_life")


@dataclass(frozen=True)
class StatesSuite:
    """`prompts` rows of `length` tokens: the task's filler, or held-out documents."""

    source: Source
    prompts: int
    length: int
    train_length: int

    @property
    def tokens(self) -> int:
        return self.prompts * self.length

    def run(self, reader: Reader) -> dict[str, Any]:
        """{"length", "prompts", "heads": [{layer, head, rms_inside, rms_beyond, retention, half_life}]}.

        retention: of the first token over one training length; rms: the largest within and beyond it. A head
        whose state is no longer finite has the values up to there; `non_finite` says where.
        """
        measures = read_prompt(
            reader,
            probe_of(reader.model),
            self.source,
            train_length=self.train_length,
            length=self.length,
            stride=None,
            bucket=self.train_length,
        )
        heads = [{name: row[name] for name in KEPT} for row in head_rows(measures, ThresholdsConfig())]
        bad = measures.non_finite
        return {
            "length": self.length,
            "prompts": self.prompts,
            "heads": heads,
            "non_finite": None if bad is None else bad.position,
        }


def plan_states(config: EvaluateConfig, data: DataConfig, tokenizer: Tokenizer) -> StatesSuite:
    """Choose what to read. Raises ValueError where held-out documents are too short."""
    settings, train_length = config.states, data.train_length
    length = settings.length or FACTOR * train_length
    if length <= train_length:
        raise ValueError(f"states.length={length}: must exceed the training length, {train_length}")
    if data.name == "passkey":
        source = filler_source(tokenizer, settings.prompts)
    else:
        source, _ = held_out_text(data, tokenizer, config.split, length, settings.prompts, config.seed)
    return StatesSuite(source=source, prompts=settings.prompts, length=length, train_length=train_length)


def state_metrics(states: dict[str, Any] | None) -> dict[str, float]:
    """Flat names -> numbers: over all heads the largest and the median."""
    if states is None:
        return {}
    heads = states["heads"]
    growth = [head["rms_beyond"] / head["rms_inside"] for head in heads if head["rms_inside"] > 0]
    numbers: dict[str, float] = {}
    for name, values in (
        ("rms_growth", growth),
        ("rms_beyond", [head["rms_beyond"] for head in heads]),
        ("retention", [head["retention"] for head in heads]),
    ):
        if values:
            numbers |= {
                f"states/{name}_max": float(np.max(values)),
                f"states/{name}_median": float(np.median(values)),
            }
    return numbers

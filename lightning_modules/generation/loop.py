"""Prompts in, tokens out: reads them, then feeds every row its own tokens until it ends."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from conf.generate_schema import DecodingConfig
from data.tokenizers import Tokenizer
from lightning_modules.backbone import Mamba2LM
from lightning_modules.evaluation.streaming import Reader
from lightning_modules.generation.prefill import Prompt, read_prompts
from lightning_modules.generation.sampling import NON_FINITE, Sampler, Uniforms
from lightning_modules.generation.step import Step, make_step
from lightning_modules.generation.text import StopStrings, TextStream
from lightning_modules.mitigations import AnyMitigation, for_layers
from lightning_modules.state import ModelState

Finish = Literal["end", "stop", "length"]


@dataclass(frozen=True)
class Piece:
    """What a row has added: text that is certain (it may be empty), and why the row ends if it does: `end`
    of text, a `stop` string, or the `length` asked for."""

    row: int
    token: int
    text: str
    finish: Finish | None


@dataclass
class Row:
    """A prompt's continuation. tokens: all that were fed, those of a stop string included; text: without."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None

    def add(self, piece: Piece) -> None:
        self.text, self.finish = self.text + piece.text, piece.finish
        if piece.finish != "end":
            self.tokens.append(piece.token)


@dataclass
class Generation:
    """Rows in the order of the prompts, and the state after the last token of each."""

    rows: list[Row]
    state: ModelState

    @property
    def texts(self) -> list[str]:
        return [row.text for row in self.rows]

    @property
    def tokens(self) -> list[list[int]]:
        return [row.tokens for row in self.rows]


class Generator:
    """One batch of prompts. Iterating reads them, then yields a `Piece` for every token of every row.

    Prompts are read in segments, tokens made one at a time; memory depends on neither's number. A row that
    has ended changes no more. Afterwards `state` is the state after the last token of every row.
    """

    def __init__(
        self,
        model: Mamba2LM,
        prompts: Sequence[Prompt],
        config: DecodingConfig,
        *,
        tokenizer: Tokenizer | None = None,
        state: ModelState | None = None,
        mitigation: AnyMitigation | None = None,
        seeds: list[int] | None = None,
        on_tokens: Callable[[int], None] = lambda _: None,
    ) -> None:
        """
        Args:
            prompts: ids of each. state: of one row, for all prompts, or of a row each; None: from nothing.
            tokenizer: None: no text, no stop strings, no end of text.
            seeds: one a row; None: config.seed, config.seed + 1, ...
            on_tokens: told how many were read.

        Raises:
            ValueError: a prompt is empty or holds what is no id of the model; a state of another mitigation
                or number of rows; stop strings without a tokenizer.
        """
        self.model, self.prompts, self.config, self.tokenizer = model, prompts, config, tokenizer
        self.rules = for_layers(mitigation, model.config.n_layers)
        self.seeds = seeds or [config.seed + i for i in range(len(prompts))]
        self.on_tokens = on_tokens
        self._before = _spread(state, len(prompts), self.rules.key)
        self.state: ModelState | None = None
        check_prompts(prompts, model.config.vocab_size)
        if config.stop and tokenizer is None:
            raise ValueError(f"stop={config.stop}: needs a tokenizer, which turns tokens into text")

    def __iter__(self) -> Iterator[Piece]:
        reader = Reader(self.model, self.rules, self.config.segment_length, self.on_tokens)
        self.state, hidden = read_prompts(reader, self.prompts, self._before)
        if self.config.max_new_tokens == 0:
            with torch.inference_mode(False):
                self.state = self.state.with_tensors(t.clone() for t in self.state.tensors())
            return
        step, chosen, uniforms = self._first(hidden)
        self.state = step.state
        rows = [_Progress(self.config, self.tokenizer) for _ in self.prompts]
        while any(row.finish is None for row in rows):
            tokens = chosen.tolist()
            fed = torch.zeros(len(rows), dtype=torch.bool)
            for index, row in enumerate(rows):
                if row.finish is None:
                    if tokens[index] == NON_FINITE:
                        raise ValueError(_non_finite(index, row.count, self.rules.key))
                    yield Piece(index, tokens[index], row.take(tokens[index]), row.finish)
                    fed[index] = row.finish != "end"
            if not fed.any():
                break
            chosen = step(torch.tensor(tokens).clamp(min=0), fed, uniforms.next())

    def _first(self, hidden: Tensor) -> tuple[Step, Tensor, Uniforms]:
        limit = self.model.config.vocab_size
        if self.tokenizer is not None:
            limit = min(limit, self.tokenizer.vocab_size)
        sampler, uniforms = Sampler(self.config, limit), Uniforms(self.seeds)
        assert self.state is not None
        step = make_step(self.model, self.state, self.rules, sampler, self.config.cuda_graph)
        return step, step.choose(hidden, uniforms.next()), uniforms


class _Progress:
    """A row while it goes on."""

    def __init__(self, config: DecodingConfig, tokenizer: Tokenizer | None) -> None:
        self.finish: Finish | None = None
        self.count = 0
        self._limit, self._end = config.max_new_tokens, None if tokenizer is None else tokenizer.eos_id
        self._stream = None if tokenizer is None else TextStream(tokenizer)
        self._stops = StopStrings(config.stop)

    def take(self, token: int) -> str:
        """The text that this token makes certain; sets `finish` where the row ends."""
        if token == self._end:
            self.finish = "end"
            return self._rest("")
        self.count += 1
        if self._stream is None:
            self.finish = "length" if self.count == self._limit else None
            return ""
        text, found = self._stops.push(self._stream.push(token))
        if found:
            self.finish = "stop"
        elif self.count == self._limit:
            self.finish = "length"
            text = self._rest(text)
        return text

    def _rest(self, text: str) -> str:
        """All that was held back."""
        if self._stream is None:
            return text
        last, found = self._stops.push(self._stream.flush())
        if found:
            self.finish = "stop"
        return text + last + self._stops.flush()


def generate(generator: Generator) -> Generation:
    """Run it to the end."""
    rows = [Row() for _ in generator.prompts]
    for piece in generator:
        rows[piece.row].add(piece)
    assert generator.state is not None
    return Generation(rows, generator.state)


def as_prompts(ids: Sequence[Prompt] | Sequence[Sequence[int]] | Tensor, mask: Tensor | None) -> list[Prompt]:
    """Prompts from rows of ids; `mask` (B, T) is true where a row has a token and not padding."""
    if mask is not None:
        if not isinstance(ids, Tensor) or ids.shape != mask.shape:
            raise ValueError("mask: must have the shape of ids, a tensor (B, T)")
        ids = [row[kept] for row, kept in zip(ids.cpu(), mask.bool().cpu(), strict=True)]
    return [np.asarray(row.cpu() if isinstance(row, Tensor) else row, np.int64).reshape(-1) for row in ids]


def check_prompts(prompts: Sequence[Prompt], vocab_size: int) -> None:
    """Refuse prompts without a token, and ids that the model does not have."""
    if not prompts:
        raise ValueError("prompt=[]: give at least one")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {index + 1} of {len(prompts)} is empty: give at least one token")
        low, high = int(prompt.min()), int(prompt.max())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"prompt {index + 1}: token {wrong}: the model's ids are 0 to {vocab_size - 1}")


def _spread(state: ModelState | None, rows: int, mitigation: str) -> ModelState | None:
    """A row of the state for each prompt."""
    if state is None:
        return None
    if state.batch_size == 1 and rows > 1:
        state = state.rows(torch.zeros(rows, dtype=torch.int64, device=state.position.device))
    state.require(mitigation, rows)
    return state


def _non_finite(row: int, count: int, mitigation: str) -> str:
    return (
        f"prompt {row + 1}: NaN or infinity in the logits after {count} new tokens, mitigation {mitigation}: "
        "check the checkpoint, or try another mitigation or dtype=float32"
    )

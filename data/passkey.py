"""The passkey task (arXiv 2410.07145, appendix B.1): find a number stated once in repetitive filler.

Prompt = [opening] filler needle filler question answer, cut to an exact number of tokens: the filler starts
anywhere in its period so that it always ends on a sentence, and the needle stands between two sentences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from conf.passkey import FILLER, NEEDLE, OPENING, QUESTION
from conf.schema import PasskeyConfig
from data.filler import Filler
from data.layout import Batch, Ints, Layout, Piece, to_batch
from data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Prompts:
    """ids (n, length) int64; answer (n, length) bool, True on the answer's digits; needle_start (n,)."""

    ids: Ints
    answer: NDArray[np.bool_]
    needle_start: Ints


class PasskeyTask:
    """Passkey prompts of exact length with any tokenizer, a whole batch at a time."""

    def __init__(self, tokenizer: Tokenizer, config: PasskeyConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.opening = tokenizer.encode(OPENING) if config.opening else np.empty(0, np.int64)
        self.filler = Filler(tokenizer)
        self.needle = [tokenizer.encode(part) for part in NEEDLE]
        self.question = tokenizer.encode(QUESTION)
        self._digit_tokens: dict[int, bool] = {}

    @property
    def n_keys(self) -> int:
        return int(10**self.config.digits)

    def fixed_length(self, key: int = 0) -> int:
        """Tokens of a prompt without filler: opening, needle, question and answer."""
        return self._fixed_length(self._key(key))

    def prompts(
        self, length: int, keys: Sequence[int] | Ints, starts: Ints, endings: Ints | None = None
    ) -> Prompts:
        """Prompts of exactly `length` tokens.

        Args:
            length: tokens per prompt, answer included.
            keys: (n,) integers in [0, 10^digits).
            starts: (n,) token positions; each needle begins at the first sentence end at or after its own.
            endings: (n,) in [0, 5), the filler sentence that precedes the question; None for the last one.

        Raises:
            ValueError: when the prompt does not fit into `length`.
        """
        layout = self.layout(length, keys, starts, endings)
        return Prompts(layout.ids(0, length), layout.answer(0, length) > 0, layout.branch)

    def layout(
        self,
        length: int,
        keys: Sequence[int] | Ints,
        starts: Ints,
        endings: Ints | None = None,
        alike: bool = False,
    ) -> Layout:
        """The prompts of `prompts`, not yet written out: memory does not grow with `length`.

        alike: prompts of equal ending begin alike even where their keys differ in tokens. Behind the needle
        the filler then goes on within a sentence.
        """
        encoded = [self._key(int(key)) for key in keys]
        fixed = np.array([self._fixed_length(key) for key in encoded])
        if length < fixed.max():
            raise ValueError(
                f"data.train_length={length}: a passkey prompt needs at least {fixed.max()} tokens here; "
                "use a longer length or data.passkey.opening=false"
            )
        filler_length = length - fixed
        ending = np.full(len(encoded), len(FILLER) - 1) if endings is None else endings
        phase = self.filler.phase(filler_length, ending)
        skip = np.zeros(len(phase), np.int64)
        if alike:
            begins = self.filler.phase(length - self.fixed_length(), ending)
            phase, skip = begins, (phase - begins) % len(self.filler.ids)
        before = np.clip(starts - len(self.opening), 0, filler_length)
        before = np.minimum(self.filler.snap(phase, before), filler_length)
        needle_start = len(self.opening) + before
        return Layout(
            length=length,
            background=self.filler.tokens,
            place=phase,
            pieces=[
                self._pieces(length, key, int(start), int(behind))
                for key, start, behind in zip(encoded, needle_start, skip, strict=True)
            ],
            group=phase,
            branch=needle_start,
            depth=before / np.maximum(filler_length, 1),
        )

    def _pieces(self, length: int, key: Ints, needle_start: int, skip: int) -> list[Piece]:
        first, second, third = self.needle
        asked = np.concatenate([np.zeros(len(self.question), np.int64), self._carries_digit(key)])
        return [
            Piece(0, self.opening),
            Piece(needle_start, np.concatenate([first, key, second, key, third]), skip=skip),
            Piece(length - len(asked), np.concatenate([self.question, key]), asked),
        ]

    def sample(self, length: int, indices: Sequence[int] | Ints, seed: Sequence[int]) -> Batch:
        """Training batch whose row i is a pure function of (seed, indices[i], length).

        Returns ids, targets (n, length) int64, loss_weight (n, length) fp32, answer (n, length) bool, where
        answer and loss_weight refer to the target at a position.
        """
        draws = np.stack([np.random.default_rng([*seed, int(i)]).random(3) for i in indices])
        keys = (draws[:, 0] * self.n_keys).astype(np.int64)
        filler_length = length - self.fixed_length()
        starts = len(self.opening) + np.floor(draws[:, 1] * (filler_length + 1)).astype(np.int64)
        endings = (draws[:, 2] * len(FILLER)).astype(np.int64)
        return self.batch(self.prompts(length, keys, starts, endings))

    def position(self, length: int, index: int, seed: Sequence[int]) -> dict[str, float]:
        """Nothing to tell beyond the index: prompts never repeat."""
        return {}

    def batch(self, prompts: Prompts) -> Batch:
        """Whole prompts as inputs and targets."""
        return to_batch(prompts.ids, prompts.answer, self.config.filler_weight)

    def _key(self, key: int) -> Ints:
        return self.tokenizer.encode(f" {key:0{self.config.digits}d}")

    def _fixed_length(self, key: Ints) -> int:
        return sum(len(part) for part in (self.opening, *self.needle, self.question)) + 3 * len(key)

    def _carries_digit(self, key: Ints) -> Ints:
        """Which tokens of a key carry a digit (a byte tokenizer's leading space does not), 1 or 0."""
        for i in set(key.tolist()) - self._digit_tokens.keys():
            self._digit_tokens[i] = any(c.isdigit() for c in self.tokenizer.decode([i]))
        return np.array([self._digit_tokens[i] for i in key.tolist()], np.int64)

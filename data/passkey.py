"""The passkey task (arXiv 2410.07145, appendix B.1): find a number stated once in repetitive filler.

Prompt = [opening] filler needle filler question answer, cut to an exact number of tokens: the filler starts
anywhere in its period so that it always ends on a sentence, and the needle stands between two sentences.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from conf.passkey import FILLER, NEEDLE, OPENING, QUESTION
from conf.schema import PasskeyConfig
from data.tokenizers import Tokenizer

Ints = NDArray[np.int64]
Keys = Sequence[int] | Ints
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Prompts:
    """ids (n, length) int64; answer (n, length) bool, True on the answer's digits; needle_start (n,)."""

    ids: Ints
    answer: NDArray[np.bool_]
    needle_start: Ints


@dataclass(frozen=True)
class Layout:
    """Where everything stands in n prompts of `length` tokens; `ids` and `answer` write out any stretch.

    Rows of equal `phase` hold the same tokens up to the nearer of their needles.
    """

    length: int
    opening: Ints
    filler: Ints
    phase: Ints  # (n,) where in its period the filler begins
    needle_start: Ints  # (n,)
    needles: list[Ints]
    tails: list[Ints]  # question and answer, the last tokens of a prompt
    carries_digit: list[NDArray[np.bool_]]  # of the answer, the last tokens of a tail

    def __len__(self) -> int:
        return len(self.needles)

    def rows(self, index: Sequence[int] | Ints) -> "Layout":
        """Select prompts."""
        return replace(
            self,
            phase=self.phase[index],
            needle_start=self.needle_start[index],
            needles=[self.needles[i] for i in index],
            tails=[self.tails[i] for i in index],
            carries_digit=[self.carries_digit[i] for i in index],
        )

    def ids(self, begin: int, end: int) -> Ints:
        """Tokens [begin, end) of every prompt, (n, end - begin) int64."""
        column = np.arange(begin, end) - len(self.opening)
        needle_length = np.array([len(needle) for needle in self.needles])
        behind = column >= (self.needle_start - len(self.opening))[:, None]
        offset = column - behind * needle_length[:, None]
        ids = self.filler[(offset + self.phase[:, None]) % len(self.filler)]
        for row, needle, start, tail in zip(ids, self.needles, self.needle_start, self.tails, strict=True):
            _overlay(row, begin, self.opening, 0)
            _overlay(row, begin, needle, start)
            _overlay(row, begin, tail, self.length - len(tail))
        return ids

    def answer(self, begin: int, end: int) -> NDArray[np.bool_]:
        """Which of the tokens [begin, end) are the answer's digits, (n, end - begin) bool."""
        answer = np.zeros((len(self.tails), end - begin), bool)
        for row, carries in zip(answer, self.carries_digit, strict=True):
            _overlay(row, begin, carries, self.length - len(carries))
        return answer


def _overlay(row: NDArray, begin: int, piece: NDArray, start: int) -> None:
    """Write `piece`, which stands at `start`, into `row`, which shows the tokens from `begin` on."""
    low, high = max(start, begin), min(start + len(piece), begin + len(row))
    if low < high:
        row[low - begin : high - begin] = piece[low - start : high - start]


class PasskeyTask:
    """Passkey prompts of exact length with any tokenizer, a whole batch at a time."""

    def __init__(self, tokenizer: Tokenizer, config: PasskeyConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.opening = tokenizer.encode(OPENING) if config.opening else np.empty(0, np.int64)
        sentences = [tokenizer.encode(s) for s in FILLER]
        self.filler = np.concatenate(sentences)
        self.endings = np.cumsum([len(s) for s in sentences])  # sentence ends, as token offsets in the period
        # distance from each offset in the period to the first sentence end at or after it
        offsets = np.arange(len(self.filler))
        distance = (self.endings[None] - offsets[:, None]) % len(self.filler)
        self.to_sentence_end = distance.min(1)
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
        return Prompts(layout.ids(0, length), layout.answer(0, length), layout.needle_start)

    def layout(
        self, length: int, keys: Sequence[int] | Ints, starts: Ints, endings: Ints | None = None
    ) -> Layout:
        """The prompts of `prompts`, not yet written out: memory does not grow with `length`."""
        encoded = [self._key(int(key)) for key in keys]
        fixed = np.array([self._fixed_length(key) for key in encoded])
        if length < fixed.max():
            raise ValueError(
                f"data.train_length={length}: a passkey prompt needs at least {fixed.max()} tokens here; "
                "use a longer length or data.passkey.opening=false"
            )
        filler_length = length - fixed
        period = len(self.filler)
        ending = self.endings[-1] if endings is None else self.endings[endings]
        phase = (ending - filler_length) % period
        before = np.clip(starts - len(self.opening), 0, filler_length)
        before = np.minimum(before + self.to_sentence_end[(before + phase) % period], filler_length)
        first, second, third = self.needle
        return Layout(
            length=length,
            opening=self.opening,
            filler=self.filler,
            phase=phase,
            needle_start=len(self.opening) + before,
            needles=[np.concatenate([first, key, second, key, third]) for key in encoded],
            tails=[np.concatenate([self.question, key]) for key in encoded],
            carries_digit=[self._carries_digit(key) for key in encoded],
        )

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
        """Shift prompts into inputs and targets; the last position has no target and no loss."""
        targets, answer = np.roll(prompts.ids, -1, axis=1), np.roll(prompts.answer, -1, axis=1)
        answer[:, -1] = False
        weight = np.where(answer, 1.0, self.config.filler_weight).astype(np.float32)
        weight[:, -1] = 0.0
        return {
            "ids": torch.from_numpy(prompts.ids),
            "targets": torch.from_numpy(targets),
            "loss_weight": torch.from_numpy(weight),
            "answer": torch.from_numpy(answer),
        }

    def _key(self, key: int) -> Ints:
        return self.tokenizer.encode(f" {key:0{self.config.digits}d}")

    def _fixed_length(self, key: Ints) -> int:
        return sum(len(part) for part in (self.opening, *self.needle, self.question)) + 3 * len(key)

    def _carries_digit(self, key: Ints) -> NDArray[np.bool_]:
        """Which tokens of a key carry a digit (a byte tokenizer's leading space does not)."""
        for i in set(key.tolist()) - self._digit_tokens.keys():
            self._digit_tokens[i] = any(c.isdigit() for c in self.tokenizer.decode([i]))
        return np.array([self._digit_tokens[i] for i in key.tolist()])

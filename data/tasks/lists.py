"""Prompts that are one long list: RULER's multi-key needles 2 and 3, common and frequent words.

A list is cut to its length within its first item, which is never asked for.
"""

import uuid
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random import Generator

from data.filler import Filler
from data.layout import Ints, Layout
from data.tasks.needles import NUMBER, draw_number
from data.tasks.task import Draw, Row, Task, to_layout
from data.tasks.text import SAMPLES, require_fits, tail_piece
from data.tasks.words import Marker, draw_words
from data.tokenizers import Tokenizer

SLACK = 4  # tokens that some question may have more than the longest of `SAMPLES`


class ListTask(Task):
    """A task whose background is a list made whole."""

    def __init__(self, tokenizer: Tokenizer, filler_weight: float | None) -> None:
        self.tokenizer = tokenizer
        self.filler_weight = 0.1 if filler_weight is None else filler_weight
        self.marker = Marker(tokenizer)

    @abstractmethod
    def write(self, length: int, draw: Draw) -> tuple[Ints, Ints, list[Ints], float]:
        """The list, at most `length` tokens less question and answer; the question; the answer's parts; the
        depth of what is asked for, as a share of the list, NaN for none."""

    def layout(self, length: int, draws: Sequence[Draw]) -> Layout:
        lists: dict[bytes, int] = {}
        arrays: list[Ints] = []
        rows: list[Row] = []
        for draw in draws:
            ids, question, answer, depth = self.write(length, draw)
            tail = tail_piece(length, question, answer, self.marker)
            assert len(ids) == tail.start
            key = ids.tobytes()
            if key not in lists:
                lists[key] = len(arrays)
                arrays.append(ids)
            rows.append(Row(lists[key], [tail], lists[key], tail.start, depth))

        def background(place: Ints, column: Ints) -> Ints:
            return np.stack([arrays[i].take(c, mode="clip") for i, c in zip(place, column, strict=True)])

        return to_layout(length, background, rows)


class MultiKey(ListTask):
    """niah_multikey_2 (words and numbers) and niah_multikey_3 (UUIDs): nothing but needles, one asked for.

    Prompts of a haystack differ in which alone. Questions differ in tokens: the list leaves room for a long
    one, and a shorter one has the last tokens of the filler before it.
    """

    def __init__(self, tokenizer: Tokenizer, filler_weight: float | None, uuids: bool) -> None:
        super().__init__(tokenizer, filler_weight)
        self.uuids, self.filler = uuids, Filler(tokenizer).ids
        self._last: tuple[Any, list[tuple[str, str]], list[Ints]] | None = None
        made = [self._items(np.random.default_rng([0, i]), 1) for i in range(SAMPLES)]
        self._item = np.mean([len(tokenizer.encode(_state(*items[0]))) for items in made])
        asked = [tokenizer.encode_batch(_ask(*items[0])) for items in made]
        tails = {len(question) + len(answer) for question, answer in asked}
        self._tail = max(tails) + (SLACK if len(tails) > 1 else 0)
        self._longest = max(len(tokenizer.encode(_state(*items[0]))) for items in made)

    def shortest(self) -> int:
        return self._tail + 3 * self._longest

    def chance(self, length: int) -> float:
        return 1 / max(1, round((length - self._tail) / self._item))

    def write(self, length: int, draw: Draw) -> tuple[Ints, Ints, list[Ints], float]:
        require_fits(length, self.shortest(), "niah_multikey")
        items, encoded = self._list(length, draw)
        n = len(items)
        sizes = np.array([len(ids) for ids in encoded])
        whole = int(np.searchsorted(np.cumsum(sizes[::-1]), length - self._tail, side="right"))
        own = draw.private()
        asked = n - whole + int(draw.draw_depth(own) * whole)
        question, answer = self.tokenizer.encode_batch(_ask(*items[asked]))
        room = length - self._tail
        left = self._tail - len(question) - len(answer)
        pad = np.take(self.filler, np.arange(-left, 0), mode="wrap")
        ids = np.concatenate(encoded)[-room:]
        return ids, np.concatenate([pad, question]), [answer], (asked - n + whole) / whole

    def _list(self, length: int, draw: Draw) -> tuple[list[tuple[str, str]], list[Ints]]:
        """More items than fit, of which the last are kept; those of the last haystack are not made again."""
        key = (length, draw.haystack)
        if self._last is None or self._last[0] != key:
            items = self._items(draw.shared(), 10 + int(length / self._item * 1.2))
            self._last = key, items, self.tokenizer.encode_batch([_state(*item) for item in items])
        return self._last[1:]

    def _items(self, rng: Generator, n: int) -> list[tuple[str, str]]:
        if self.uuids:
            return [(_uuid(rng), _uuid(rng)) for _ in range(n)]
        return [(name, draw_number(rng, NUMBER)) for name in draw_words(rng, n)]


def _state(key: str, value: str) -> str:
    return f" The secret number of {key} is {value}."


def _ask(key: str, value: str) -> tuple[str, str]:
    return f" What is the secret number of {key}? The secret number of {key} is", f" {value}"


def _uuid(rng: Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


class WordList(ListTask):
    """A list of words of which the most frequent are asked for. Rare words fill it up to its length."""

    def __init__(self, tokenizer: Tokenizer, filler_weight: float | None, asked: int) -> None:
        super().__init__(tokenizer, filler_weight)
        self.asked = asked
        samples = tokenizer.encode_batch([f" {name}" for name in draw_words(np.random.default_rng(0), 512)])
        self._word = float(np.mean([len(ids) for ids in samples]))
        self._longest = max(len(ids) for ids in samples)
        self._least = max(1, min(len(ids) for ids in samples) - 1)

    @abstractmethod
    def question(self) -> str: ...

    @abstractmethod
    def counts(self, words: float) -> Ints:
        """How often each word of about so many occurs; those asked for first, and more often than others. Of
        0 words: as often as they must, which `shortest` has room for."""

    @property
    @abstractmethod
    def at_most(self) -> int:
        """How often a word may occur that fills the list up."""

    def _tail(self) -> int:
        return len(self.tokenizer.encode(self.question())) + self.asked * self._longest

    def chance(self, length: int) -> float:
        words = (length - self._tail()) / self._word
        return 1 / max(1, len(self.counts(words)))

    def write(self, length: int, draw: Draw) -> tuple[Ints, Ints, list[Ints], float]:
        require_fits(length, self.shortest(), type(self).__name__)
        rng = draw.private()
        words = 0.98 * (length - self._tail()) / self._word
        counts = self.counts(words)
        names = draw_words(rng, len(counts))
        encoded = self.tokenizer.encode_batch([f" {name}" for name in names])
        sizes = np.array([len(ids) for ids in encoded])
        question = self.tokenizer.encode(self.question())
        room = length - len(question) - int(sizes[: self.asked].sum())
        while int(counts @ sizes[: len(counts)]) > room:
            words *= 0.98  # words were longer than most: fewer are listed
            counts = self.counts(words)
        missing = room - int(counts @ sizes[: len(counts)])
        encoded = encoded[: len(counts)]
        # So many that what is left of them, less those listed, is enough.
        more = draw_words(rng, len(names) + missing // (self.at_most * self._least) + 1)
        listed = set(names)
        others = [f" {name}" for name in more if name not in listed]
        encoded += self.tokenizer.encode_batch(others)
        filling: list[int] = []
        while missing > 0:
            filling.append(len(counts) + len(filling) // self.at_most)
            missing -= len(encoded[filling[-1]])
        # The last of the filling comes first: it is the one that the list is cut within.
        words_in_order = rng.permutation([*np.repeat(np.arange(len(counts)), counts), *filling[:-1]])
        order = [*filling[-1:], *words_in_order.tolist()]
        asked = self.order([i for i in dict.fromkeys(order) if i < self.asked])
        ids = np.concatenate([encoded[i] for i in order])[-room:]
        return ids, question, [encoded[i] for i in asked], float("nan")

    def order(self, asked: list[int]) -> list[int]:
        """The order in which an answer names them, given that of their first occurrences."""
        return asked


class CommonWords(WordList):
    """common_words: a few words occur often, all others seldom; the answer is in order of appearance."""

    def __init__(
        self, tokenizer: Tokenizer, filler_weight: float | None, common: int, often: int, seldom: int
    ) -> None:
        self.often, self.seldom = often, seldom
        super().__init__(tokenizer, filler_weight, common)

    @property
    def at_most(self) -> int:
        return self.seldom

    def question(self) -> str:
        return f" The {self.asked} most common words, in the order in which they first appear, are"

    def counts(self, words: float) -> Ints:
        rare = max(0, int((words - self.asked * self.often) / self.seldom))
        return np.array([self.often] * self.asked + [self.seldom] * rare)

    def shortest(self) -> int:
        return self._tail() + self._longest * (self.asked * self.often + 2 * self.seldom)


class FrequentWords(WordList):
    """frequent_words: words as frequent as Zipf's law has it; the answer begins with the most frequent."""

    at_most = 1

    def __init__(self, tokenizer: Tokenizer, filler_weight: float | None, frequent: int, zipf: float) -> None:
        self.zipf = zipf
        super().__init__(tokenizer, filler_weight, frequent)

    def question(self) -> str:
        return f" The {self.asked} most frequent words, beginning with the most frequent, are"

    def counts(self, words: float) -> Ints:
        # Words that the law has occur less than once are the list's filling, each once.
        rank = np.arange(1, max(self.asked, 1 + int(words)) + 1)
        share = rank**-self.zipf
        counts = np.floor(max(0.0, words - self._fewest) * share / share.sum()).astype(np.int64)
        counts = counts[: max(self.asked, int((counts >= 1).sum()))]
        below = int(counts[self.asked]) if len(counts) > self.asked else 1
        for i in reversed(range(self.asked)):  # each more often than the next, also where the law is flat
            below = counts[i] = max(int(counts[i]), below + 1)
        return counts

    def shortest(self) -> int:
        """Room for the words asked for: the last twice, each before it once more."""
        return self._tail() + self._longest * (self._fewest + 2)

    @property
    def _fewest(self) -> int:
        return self.asked * (self.asked + 3) // 2

    def order(self, asked: list[int]) -> list[int]:
        return sorted(asked)

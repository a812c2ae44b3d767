"""Tasks in words: needles between the sentences of a text, a question and its answer at the end."""

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.random import Generator

from data.filler import Filler
from data.layout import Ints, Layout, Piece
from data.store import Stream
from data.tasks.task import Draw, Row, Task, to_layout
from data.tasks.words import Marker
from data.tokenizers import Tokenizer

SAMPLES = 64  # prompts whose longest stands for all
NOTHING = np.empty(0, np.int64)


class Haystack(Protocol):
    """Text of any length. A `place` is where it begins."""

    def place(self, rng: Generator, length: int) -> int:
        """A random place from which `length` tokens end with a sentence; ValueError without so many."""

    def snap(self, place: int, column: int) -> int:
        """The first sentence end at or near behind `column`."""

    def tokens(self, place: Ints, column: Ints) -> Ints:
        """As `data.layout.Background`."""


class FillerHaystack:
    """The passkey task's five sentences, over and over."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.filler = Filler(tokenizer)
        self.tokens = self.filler.tokens

    def place(self, rng: Generator, length: int) -> int:
        return int(self.filler.phase(length, int(rng.integers(len(self.filler.endings)))))

    def snap(self, place: int, column: int) -> int:
        return int(self.filler.snap(place, column))


class ProseHaystack:
    """Documents of a stream, from any place of it: every haystack is another text."""

    REACH = 256  # tokens behind a place in which a sentence's end is looked for

    def __init__(self, tokenizer: Tokenizer, stream: Stream) -> None:
        self.tokenizer, self.stream = tokenizer, stream
        self._ends: dict[int, bool] = {}

    def place(self, rng: Generator, length: int) -> int:
        if length > len(self.stream):
            raise ValueError(
                f"data.documents: only {len(self.stream):,} tokens of text to hide in, not {length:,}; "
                "give more text or shorter prompts"
            )
        end = self._behind_sentence(int(rng.integers(len(self.stream))))
        return (end - length) % len(self.stream)

    def snap(self, place: int, column: int) -> int:
        return self._behind_sentence(place + column) - place

    def tokens(self, place: Ints, column: Ints) -> Ints:
        return self.stream.take(place[:, None] + column)

    def _behind_sentence(self, position: int) -> int:
        """`position` itself where no sentence ends within reach."""
        ids = self.stream.take(position - 1 + np.arange(self.REACH))
        for i in set(ids.tolist()) - self._ends.keys():
            self._ends[i] = i == self.stream.eos_id or self.tokenizer.decode([i]).rstrip().endswith(
                (".", "!", "?")
            )
        ends = np.flatnonzero([self._ends[i] for i in ids.tolist()])
        return position + int(ends[0]) if len(ends) else position


@dataclass(frozen=True)
class Needle:
    """ids to be hidden at `depth` in [0, 1), a share of the text that is not otherwise taken."""

    depth: float
    ids: Ints


@dataclass(frozen=True)
class Story:
    """A prompt in words, before it has its length. asked: which needle has the answer, for its depth.

    shared: all prompts with this haystack have these needles, and differ in the question alone.
    """

    needles: list[Needle]
    question: Ints
    answer: list[Ints]
    asked: int | None = None
    shared: bool = False


class TextTask(Task):
    """A task whose prompts are stories in a haystack.

    Prompts of a haystack begin alike, though words and numbers differ in tokens: in the last sentences before
    the question, `JOINT` tokens or so, the text leaves out what makes it end with a sentence again.
    """

    JOINT = 32

    def __init__(self, tokenizer: Tokenizer, haystack: Haystack, filler_weight: float | None) -> None:
        self.tokenizer, self.haystack = tokenizer, haystack
        self.filler_weight = 0.1 if filler_weight is None else filler_weight
        self.marker = Marker(tokenizer)
        self._usual: int | None = None

    @abstractmethod
    def story(self, length: int, draw: Draw, shared: Generator, own: Generator) -> Story:
        """What a prompt of `length` tokens tells and asks. `shared` is spent alike for equal haystacks."""

    def shortest(self) -> int:
        stories = (self._story(0, Draw((i, 0), (i, 1))) for i in range(SAMPLES))
        return max(_fixed_length(story) for story, _ in stories)

    def layout(self, length: int, draws: Sequence[Draw]) -> Layout:
        return to_layout(length, self.haystack.tokens, [self._row(length, draw) for draw in draws])

    def encode(self, *texts: str) -> list[Ints]:
        return self.tokenizer.encode_batch(texts)

    def _story(self, length: int, draw: Draw) -> tuple[Story, Generator]:
        shared = draw.shared()
        return self.story(length, draw, shared, draw.private()), shared

    def _row(self, length: int, draw: Draw) -> Row:
        story, shared = self._story(length, draw)
        text = length - _fixed_length(story)
        require_fits(length, length - text, type(self).__name__)
        if self._usual is None:
            self._usual = _fixed_length(self._story(length, Draw((0, 0), (0, 1)))[0])
        usual = max(1, length - self._usual)  # places follow from this: alike though `text` differs
        place = self.haystack.place(shared, usual)
        skip = self.haystack.snap(place, text) - text
        joint = text if skip == 0 else min(self.haystack.snap(place, max(0, text - self.JOINT)), text)
        found = []
        for i, needle in enumerate(story.needles):
            column = int(needle.depth * (usual + 1))
            behind = skip if column > joint else 0
            found.append((min(self.haystack.snap(place, column + behind) - behind, text), needle.depth, i))
        pieces, used, own = [], 0, []
        for column, _, i in sorted(found):
            if joint < column and skip:
                pieces.append(Piece(joint + used, NOTHING, skip=skip))
                own.append(joint + used)
                skip = 0
            if not story.shared:
                own.append(column + used)
            pieces.append(Piece(column + used, story.needles[i].ids))
            used += len(story.needles[i].ids)
        if skip:
            pieces.append(Piece(joint + used, NOTHING, skip=skip))
            own.append(joint + used)
        tail = tail_piece(length, story.question, story.answer, self.marker)
        depth = float("nan") if story.asked is None else story.needles[story.asked].depth
        branch = min([*own, tail.start])
        key: Hashable = place
        if story.shared:
            key = (place, *((needle.depth, needle.ids.tobytes()) for needle in story.needles))
        return Row(place, [*pieces, tail], key, branch, depth)


def tail_piece(length: int, question: Ints, answer: Sequence[Ints], marker: Marker) -> Piece:
    """Question and answer, the last tokens of a prompt; each of `answer` is a part."""
    parts = [np.zeros(len(question), np.int64)]
    parts += [marker.mark(ids, i + 1) for i, ids in enumerate(answer)]
    ids = np.concatenate([question, *answer])
    return Piece(length - len(ids), ids, np.concatenate(parts))


def require_fits(length: int, needed: int, name: str) -> None:
    if length < needed:
        raise ValueError(f"length={length}: a prompt of {name} needs at least {needed} tokens; use more")


def _fixed_length(story: Story) -> int:
    needles = sum(len(needle.ids) for needle in story.needles)
    return needles + len(story.question) + sum(len(ids) for ids in story.answer)

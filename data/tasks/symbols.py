"""Tasks of random tokens, without text: associative recall, copying, induction. Any tokenizer, or none.

Token ids are drawn from [0, vocabulary). Each task cuts that range into what it needs.
"""

from collections.abc import Sequence

import numpy as np

from data.documents import mix_words
from data.layout import Background, Ints, Layout, Piece
from data.tasks.task import Draw, Row, Task, to_layout
from data.tasks.text import require_fits

GAP_POWER = 0.01  # a key is asked for soon rather than late: probability of a gap g ~ g^(GAP_POWER - 1)


def noise(first: int, size: int) -> Background:
    """Tokens uniform in [first, first + size), each a hash of its row's place and its column."""

    def tokens(place: Ints, column: Ints) -> Ints:
        words = mix_words(place.astype(np.uint64)[:, None] + column.astype(np.uint64))
        return (words % np.uint64(size)).astype(np.int64) + first

    return tokens


def _noise_place(draw_seed: tuple[int, ...]) -> int:
    return int(np.random.default_rng(draw_seed).integers(2**62))


class SymbolTask(Task):
    def __init__(self, filler_weight: float | None) -> None:
        self.filler_weight = 0.0 if filler_weight is None else filler_weight


class Recall(SymbolTask):
    """mqar: keys with values at the beginning, then each key once more, behind which its value is asked for.

    forgetting_mqar: before the questions `updates` keys get another value, the one that is then asked for.
    A third of the vocabulary each are keys, values and what stands between.
    """

    def __init__(self, filler_weight: float | None, vocabulary: int, pairs: int, updates: int) -> None:
        super().__init__(filler_weight)
        self.pairs, self.updates, self.third = pairs, updates, vocabulary // 3
        if self.third < max(pairs, 2):
            raise ValueError(
                f"data.tasks.pairs={pairs}: only {self.third} of {vocabulary} token ids are keys; use fewer "
                "pairs or a larger data.tasks.vocabulary"
            )

    def shortest(self) -> int:
        return 2 * (2 * self.pairs + self.updates)

    def chance(self, length: int) -> float:
        # Any of the values stated last: the right one, or another that is equal by chance.
        return 1 / self.pairs + (1 - 1 / self.pairs) / self.third

    def layout(self, length: int, draws: Sequence[Draw]) -> Layout:
        require_fits(length, self.shortest(), "mqar")
        rows = [self._row(length, draw) for draw in draws]
        return to_layout(length, noise(2 * self.third, self.third), rows)

    def _row(self, length: int, draw: Draw) -> Row:
        rng, third, stated = draw.private(), self.third, 2 * (self.pairs + self.updates)
        keys = rng.choice(third, self.pairs, replace=False)
        values = rng.integers(third, size=self.pairs)
        again = rng.permutation(self.pairs)[: self.updates]
        changed = values.copy()
        changed[again] = (values[again] + rng.integers(1, third, size=self.updates)) % third
        first = np.stack([np.append(keys, keys[again]), third + np.append(values, changed[again])], 1)
        # Weighted draw without replacement: the largest of log weight + Gumbel noise.
        slots = (length - stated) // 2
        score = (GAP_POWER - 1) * np.log1p(np.arange(slots)) + rng.gumbel(size=slots)
        chosen = np.sort(np.argpartition(-score, self.pairs - 1)[: self.pairs])
        pieces = [Piece(0, first.ravel())]
        for part, (slot, i) in enumerate(zip(chosen, rng.permutation(self.pairs), strict=True), 1):
            ids = np.array([keys[i], third + changed[i]])
            pieces.append(Piece(stated + 2 * int(slot), ids, np.array([0, part])))
        return Row(_noise_place((*draw.own, 1)), pieces, draw.own, 0)


class SelectiveCopying(SymbolTask):
    """selective_copying: a few tokens far apart in a sea of one blank token; then all of them in order.

    Ids: the alphabet, then the blank, then the mark behind which the copy begins.
    """

    def __init__(self, filler_weight: float | None, vocabulary: int, alphabet: int, copied: int) -> None:
        super().__init__(filler_weight)
        self.alphabet, self.copied = alphabet, copied
        _require_alphabet(alphabet, 2, vocabulary)

    def shortest(self) -> int:
        return 2 * self.copied + 1

    def chance(self, length: int) -> float:
        return 1 / self.alphabet

    def layout(self, length: int, draws: Sequence[Draw]) -> Layout:
        require_fits(length, self.shortest(), "selective_copying")
        return to_layout(length, noise(self.alphabet, 1), [self._row(length, draw) for draw in draws])

    def _row(self, length: int, draw: Draw) -> Row:
        rng, k = draw.private(), self.copied
        ids = rng.integers(self.alphabet, size=k)
        places = np.sort(rng.choice(length - k - 1, k, replace=False))
        pieces = [Piece(int(place), ids[i : i + 1]) for i, place in enumerate(places)]
        parts = np.arange(k + 1)
        tail = Piece(length - k - 1, np.append(self.alphabet + 1, ids), parts)
        return Row(0, [*pieces, tail], "blanks", int(places[0]))


class StringCopying(SymbolTask):
    """string_copying: a random string, a mark, and the string again; half the prompt each.

    Ids: the alphabet, then the mark, which also stands first where the length is even.
    """

    def __init__(self, filler_weight: float | None, vocabulary: int, alphabet: int) -> None:
        super().__init__(filler_weight)
        self.alphabet = alphabet
        _require_alphabet(alphabet, 1, vocabulary)

    def shortest(self) -> int:
        return 3

    def chance(self, length: int) -> float:
        return 1 / self.alphabet

    def layout(self, length: int, draws: Sequence[Draw]) -> Layout:
        require_fits(length, self.shortest(), "string_copying")
        size = (length - 1) // 2
        rows: list[Row] = []
        strings: list[Ints] = []
        for draw in draws:
            string = draw.private().integers(self.alphabet, size=size)
            front = np.full(length - 1 - 2 * size, self.alphabet)
            tail = np.append(self.alphabet, string)
            pieces = [Piece(0, front), Piece(length - size - 1, tail, np.arange(size + 1))]
            rows.append(Row(len(strings), pieces, draw.own, 0))
            strings.append(string)

        def background(place: Ints, column: Ints) -> Ints:
            return np.stack([strings[i].take(c, mode="clip") for i, c in zip(place, column, strict=True)])

        return to_layout(length, background, rows)


class InductionHeads(SymbolTask):
    """induction_heads: a trigger among random tokens; at the end the trigger again and what followed it.

    The trigger is the last id of the vocabulary. Prompts of a haystack share the random tokens.
    """

    def __init__(self, filler_weight: float | None, vocabulary: int) -> None:
        super().__init__(filler_weight)
        self.trigger = vocabulary - 1

    def shortest(self) -> int:
        return 4

    def chance(self, length: int) -> float:
        return 1 / self.trigger

    def layout(self, length: int, draws: Sequence[Draw]) -> Layout:
        require_fits(length, self.shortest(), "induction_heads")
        return to_layout(length, noise(0, self.trigger), [self._row(length, draw) for draw in draws])

    def _row(self, length: int, draw: Draw) -> Row:
        rng = draw.private()
        ids = np.array([self.trigger, rng.integers(self.trigger)])
        depth = draw.draw_depth(rng)
        start = int(depth * (length - 3))
        tail = Piece(length - 2, ids, np.array([0, 1]))
        # Behind the pair the noise goes on where it would have been without it.
        pieces = [Piece(start, ids, skip=2), tail]
        return Row(_noise_place(draw.haystack), pieces, draw.haystack, start, depth)


def _require_alphabet(alphabet: int, marks: int, vocabulary: int) -> None:
    if alphabet + marks > vocabulary:
        raise ValueError(
            f"data.tasks.alphabet={alphabet}: with {marks} more exceeds the {vocabulary} token ids; lower it"
        )

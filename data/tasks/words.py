"""Words that no tokenizer and no model has a liking for: three open syllables, such as ` tavomi`."""

import numpy as np
from numpy.random import Generator

from conf.tasks import MOST_WORDS
from data.layout import Ints
from data.tokenizers import Tokenizer

SYLLABLES = [consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou"]


def word(number: int) -> str:
    """The word of a number in [0, 512,000): different numbers, different words."""
    size = len(SYLLABLES)
    return SYLLABLES[number // size**2] + SYLLABLES[number // size % size] + SYLLABLES[number % size]


def draw_words(rng: Generator, n: int) -> list[str]:
    """n different words."""
    if n > MOST_WORDS:
        raise ValueError(f"a prompt of {n:,} different words: at most {MOST_WORDS:,} are made; shorten it")
    return [word(int(i)) for i in rng.choice(len(SYLLABLES) ** 3, n, replace=False)]


def longest_word(tokenizer: Tokenizer, prefix: str = " ") -> int:
    """Tokens of the longest of many words, with `prefix` before it; some word may have one or two more."""
    numbers = range(0, len(SYLLABLES) ** 3, 997)
    return max(len(ids) for ids in tokenizer.encode_batch([prefix + word(i) for i in numbers]))


class Marker:
    """Tells the tokens of an answer that carry a letter or digit: separators are not asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._carries: dict[int, bool] = {}

    def mark(self, ids: Ints, part: int) -> Ints:
        """`part` at the tokens of an answer that count, 0 at others; all of them where none has a letter."""
        for i in set(ids.tolist()) - self._carries.keys():
            self._carries[i] = any(c.isalnum() for c in self._tokenizer.decode([i]))
        carries = np.array([self._carries[i] for i in ids.tolist()])
        return np.where(carries | ~carries.any(), part, 0)

"""The repetitive text that needles are hidden in: five sentences over and over."""

import numpy as np
from numpy.typing import NDArray

from conf.passkey import FILLER
from data.tokenizers import Tokenizer

Ints = NDArray[np.int64]


class Filler:
    """ids: one period; endings (5,): where its sentences end in it. A `phase`: where a text begins."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        sentences = [tokenizer.encode(sentence) for sentence in FILLER]
        self.ids = np.concatenate(sentences)
        self.endings: Ints = np.cumsum([len(ids) for ids in sentences])
        # distance from each offset in the period to the first sentence end at or after it
        offsets = np.arange(len(self.ids))
        self._to_sentence_end: Ints = ((self.endings[None] - offsets[:, None]) % len(self.ids)).min(1)

    def phase(self, length: Ints | int, ending: Ints | int) -> Ints:
        """Where a text of `length` tokens begins that ends with the sentence `ending`."""
        return (self.endings[ending] - length) % len(self.ids)

    def snap(self, phase: Ints | int, column: Ints | int) -> Ints:
        """The first sentence end at or after `column` of a text."""
        forward: Ints = self._to_sentence_end[(column + phase) % len(self.ids)]
        return forward + column

    def tokens(self, phase: Ints, column: Ints) -> Ints:
        """Tokens at columns (n, w) of texts that begin at phases (n,)."""
        return self.ids[(column + phase[:, None]) % len(self.ids)]

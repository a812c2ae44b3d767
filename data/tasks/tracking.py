"""RULER's variable tracking: which variables hold a value, through assignments far apart."""

import numpy as np
from numpy.random import Generator

from data.tasks.task import Draw
from data.tasks.text import Haystack, Needle, Story, TextTask
from data.tasks.words import draw_words
from data.tokenizers import Tokenizer


class VariableTracking(TextTask):
    """Chains of hops: the first variable gets a number, each further one the variable before it. The answer
    names all variables of one chain in order; each is a part."""

    def __init__(
        self, tokenizer: Tokenizer, haystack: Haystack, filler_weight: float | None, chains: int, hops: int
    ) -> None:
        super().__init__(tokenizer, haystack, filler_weight)
        self.chains, self.hops = chains, hops

    def story(self, length: int, draw: Draw, shared: Generator, own: Generator) -> Story:
        size = self.hops + 1
        names = draw_words(own, self.chains * size)
        values = own.choice(90_000, self.chains, replace=False) + 10_000
        texts, depths = [], []
        for i, value in enumerate(values):
            chain = names[i * size : (i + 1) * size]
            texts += [f" Let {a} be {b}." for a, b in zip(chain, [str(value), *chain[:-1]], strict=True)]
            depths += np.sort(own.random(size)).tolist()
        question, *answer = self.encode(
            f" Which variables are {values[0]}? In order they are", *(f" {name}" for name in names[:size])
        )
        needles = [Needle(depth, ids) for depth, ids in zip(depths, self.encode(*texts), strict=True)]
        return Story(needles, question, answer)

    def chance(self, length: int) -> float:
        return 1 / (self.chains * (self.hops + 1))

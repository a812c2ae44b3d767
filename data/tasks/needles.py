"""Needles in filler or prose: variants of the passkey task, and RULER's (arXiv 2404.06654) single needle."""

import numpy as np
from numpy.random import Generator

from data.tasks.task import Draw
from data.tasks.text import Haystack, Needle, Story, TextTask
from data.tasks.words import draw_words
from data.tokenizers import Tokenizer

DIGITS = 5  # of a passkey
NUMBER = 7  # digits of a RULER needle


def draw_number(rng: Generator, digits: int) -> str:
    """Without a leading zero, as RULER has it."""
    return str(rng.integers(10 ** (digits - 1), 10**digits))


class SingleNeedle(TextTask):
    """niah_single_1 in filler, niah_essay in documents: one word's number, stated once."""

    def story(self, length: int, draw: Draw, shared: Generator, own: Generator) -> Story:
        (name,), number = draw_words(own, 1), draw_number(own, NUMBER)
        needle, question, answer = self.encode(
            f" The secret number of {name} is {number}.",
            f" What is the secret number of {name}? The secret number of {name} is",
            f" {number}",
        )
        return Story([Needle(draw.draw_depth(own), needle)], question, [answer], asked=0)

    def chance(self, length: int) -> float:
        return 1 / (9 * 10 ** (NUMBER - 1))


class RecentPasskey(TextTask):
    """passkey_recent: one passkey, always within the last `recent` tokens of the prompt."""

    def __init__(
        self, tokenizer: Tokenizer, haystack: Haystack, filler_weight: float | None, recent: int
    ) -> None:
        super().__init__(tokenizer, haystack, filler_weight)
        self.recent = recent
        needed = self.shortest()
        if recent < needed:
            raise ValueError(
                f"data.tasks.recent={recent}: needle, question and answer take {needed} tokens; use more"
            )

    def story(self, length: int, draw: Draw, shared: Generator, own: Generator) -> Story:
        key = draw_number(own, DIGITS)
        needle, question, answer = self.encode(
            f" The passkey is {key}. Remember it. {key} is the passkey.",
            " What is the pass key? The passkey is",
            f" {key}",
        )
        fixed = len(needle) + len(question) + len(answer)
        text = max(0, min(self.recent, length) - fixed)
        depth = 1 - text * (1 - draw.draw_depth(own)) / max(1, length - fixed)
        return Story([Needle(depth, needle)], question, [answer])

    def chance(self, length: int) -> float:
        return 1 / (9 * 10 ** (DIGITS - 1))


class SeveralPasskeys(TextTask):
    """`needles`: how many are stated."""

    def __init__(
        self, tokenizer: Tokenizer, haystack: Haystack, filler_weight: float | None, needles: int
    ) -> None:
        super().__init__(tokenizer, haystack, filler_weight)
        self.needles = needles


class ManyPasskeys(SeveralPasskeys):
    """passkey_many: several named passkeys, one of them asked for. Prompts of a haystack differ in which."""

    def story(self, length: int, draw: Draw, shared: Generator, own: Generator) -> Story:
        n = self.needles
        names, keys = draw_words(shared, n), [draw_number(shared, DIGITS) for _ in range(n)]
        depths = (np.arange(n) + shared.random(n)) / n
        asked = int(draw.draw_depth(own) * n)
        hidden = self.encode(
            *(f" The passkey of {a} is {b}. Remember it." for a, b in zip(names, keys, strict=True))
        )
        question, answer = self.encode(
            f" What is the passkey of {names[asked]}? The passkey of {names[asked]} is", f" {keys[asked]}"
        )
        needles = [Needle(float(depth), ids) for depth, ids in zip(depths, hidden, strict=True)]
        return Story(needles, question, [answer], asked=asked, shared=True)

    def chance(self, length: int) -> float:
        return 1 / self.needles


class OverwrittenPasskey(SeveralPasskeys):
    """passkey_overwritten: a passkey stated anew several times; the last statement holds."""

    def story(self, length: int, draw: Draw, shared: Generator, own: Generator) -> Story:
        last = draw.draw_depth(own)
        depths = [*sorted(last * own.random(self.needles - 1)), last]
        keys = [draw_number(own, DIGITS) for _ in depths]
        hidden = self.encode(*(f" The passkey is now {key}. Remember it." for key in keys))
        question, answer = self.encode(" What is the pass key? The passkey is now", f" {keys[-1]}")
        needles = [Needle(float(depth), ids) for depth, ids in zip(depths, hidden, strict=True)]
        return Story(needles, question, [answer], asked=len(needles) - 1)

    def chance(self, length: int) -> float:
        return 1 / self.needles

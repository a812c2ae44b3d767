"""Recent needles by prompt length: where a passkey model loses what it read a moment ago."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from conf.schema import DataConfig
from data.layout import Layout
from data.passkey import PasskeyTask
from data.tokenizers import Tokenizer
from lightning_modules.evaluation import passkey
from lightning_modules.evaluation.answers import score, tokens_to_read
from lightning_modules.evaluation.streaming import Reader

Row = dict[str, Any]


@dataclass(frozen=True)
class Needles:
    """The passkey task of a checkpoint, asked with the needle in the last training length of the prompt.

    Every length asks the same questions over the same last tokens: lengths differ in what came before.
    """

    task: PasskeyTask
    train_length: int
    prompts: int
    seed: int

    def ask(self, reader: Reader, length: int) -> Row:
        """{"length", "exact", "exact_low", "exact_high", "digits", ..., "answer_loss", "non_finite"}."""
        return {"length": length, **passkey.accuracy(score(reader, self._recent(length)))}

    def ask_at_any_depth(self, reader: Reader, length: int) -> Row:
        """The same with the needle anywhere: what is lost here alone is forgetting, not collapse."""
        return {"length": length, **passkey.accuracy(score(reader, self._anywhere(length)))}

    def tokens_to_read(self, recent: list[int], anywhere: list[int]) -> int:
        """Without what refining adds."""
        layouts = [*map(self._recent, recent), *map(self._anywhere, anywhere)]
        return sum(tokens_to_read(layout) for layout in layouts)

    def _recent(self, length: int) -> Layout:
        return passkey.recent_prompts(self.task, length, self.train_length, self.prompts, self.seed)

    def _anywhere(self, length: int) -> Layout:
        return passkey.recall_prompts(self.task, length, 1, self.prompts, self.seed)[0]


def plan_needles(data: DataConfig, tokenizer: Tokenizer, prompts: int, seed: int) -> Needles:
    """Raises ValueError if the training length is too short for a prompt."""
    task = PasskeyTask(tokenizer, data.passkey)
    shortest = passkey.shortest_prompt(task, prompts, seed)
    if data.train_length < shortest:
        raise ValueError(
            f"the training length={data.train_length}: a passkey prompt needs at least {shortest} tokens here"
        )
    return Needles(task, data.train_length, prompts, seed)


def refined(ask: Callable[[int], Row], lengths: list[int], lost: float, halvings: int) -> list[Row]:
    """Rows of `ask` by ascending length. Between the last length that holds and the first that is lost (exact
    match at most `lost`) the interval is halved so many times, on a log scale."""
    rows = [ask(length) for length in lengths]
    for _ in range(halvings):
        first = next((i for i, row in enumerate(rows) if row["exact"] <= lost), 0)
        if first == 0:
            break  # nothing is lost, or all of it
        low, high = rows[first - 1]["length"], rows[first]["length"]
        middle = round((low * high) ** 0.5)
        if middle in (low, high):
            break
        rows.insert(first, ask(middle))
    return rows


def doubled_lengths(train_length: int, length: int) -> list[int]:
    """1x, 2x, 4x ... the training length below `length`, and `length` itself."""
    lengths = [train_length]
    while 2 * lengths[-1] < length:
        lengths.append(2 * lengths[-1])
    return [*lengths, length]

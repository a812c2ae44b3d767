"""The suites of one evaluation: which prompts and texts, laid out and checked before anything is read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conf.measure_schema import EvaluateConfig
from conf.schema import DataConfig
from data.layout import Layout
from data.passkey import PasskeyTask
from data.tokenizers import Tokenizer
from lightning_modules.evaluation import loss as losses
from lightning_modules.evaluation import passkey
from lightning_modules.evaluation.answers import score, tokens_to_read
from lightning_modules.evaluation.splits import draw_seed
from lightning_modules.evaluation.streaming import Reader, Source
from lightning_modules.mitigations import AnyMitigation

# The mitigation for prompts of so many tokens.
Rule = Callable[[int], AnyMitigation]

# Without a setting: recent needles to 64x the training length, recall over all depths to 16x.
RECENT_FACTORS = (1, 2, 4, 8, 16, 32, 64)
RECALL_FACTOR = 16
LOSS_FACTOR = 64


@dataclass(frozen=True)
class PasskeySuite:
    """Prompts by length. recent: needles within the last `window` tokens; recall: at any depth, and which."""

    window: int
    recent: dict[int, Layout]
    recall: dict[int, tuple[Layout, NDArray[np.float64]]]

    @property
    def tokens(self) -> int:
        layouts = [*self.recent.values(), *(layout for layout, _ in self.recall.values())]
        return sum(tokens_to_read(layout) for layout in layouts)

    def run(self, reader: Reader, rule: Rule) -> dict[str, list[dict[str, Any]]]:
        """{"recent", "recall", "recall_by_length"}: the rows of evaluation.json."""
        recent = []
        for length, layout in self.recent.items():
            reader.mitigation = rule(length)
            recent.append({"length": length, **passkey.accuracy(score(reader, layout))})
        recall, by_length = [], []
        for length, (layout, depth) in self.recall.items():
            reader.mitigation = rule(length)
            scores = score(reader, layout)
            by_length.append({"length": length, **passkey.accuracy(scores)})
            for value in np.unique(depth):
                cell = passkey.accuracy(scores.select(depth == value))
                recall.append({"length": length, "depth": float(value), **cell})
        return {"recent": recent, "recall": recall, "recall_by_length": by_length}


@dataclass(frozen=True)
class LossSuite:
    """`prompts` texts of `length` tokens. text: what they are, in words for a legend. unigram: what a model
    of their token frequencies loses on the first training length; None of passkey prompts."""

    source: Source
    text: str
    prompts: int
    length: int
    bucket: int
    unigram: float | None

    @property
    def tokens(self) -> int:
        return self.prompts * self.length

    def run(self, reader: Reader, rule: Rule) -> dict[str, Any]:
        reader.mitigation = rule(self.length)
        measured = losses.loss_by_position(reader, self.source, self.length, self.bucket)
        about = {"text": self.text, "prompts": self.prompts, "length": self.length, "unigram": self.unigram}
        return about | measured


def plan_passkey(config: EvaluateConfig, data: DataConfig, tokenizer: Tokenizer) -> PasskeySuite:
    """Lay out the passkey prompts. The training length is always among the lengths.

    Raises:
        ValueError: a length or the recent window is too short for a prompt, or the window exceeds a length.
    """
    settings, train_length = config.passkey, data.train_length
    seed = draw_seed(config.seed, config.split)
    task = PasskeyTask(tokenizer, data.passkey)
    lengths = sorted(
        {train_length, *(settings.lengths or [factor * train_length for factor in RECENT_FACTORS])}
    )
    per_length = max(settings.prompts, settings.depths * settings.prompts_per_depth)
    shortest = passkey.shortest_prompt(task, per_length, seed)
    if lengths[0] < shortest:
        name = "the training length" if lengths[0] == train_length else "passkey.lengths"
        remedy = "use suites=[loss]" if lengths[0] == train_length else "drop it"
        raise ValueError(
            f"{name}={lengths[0]}: a passkey prompt needs at least {shortest} tokens here; {remedy}"
        )
    window = settings.recent_window or train_length
    if settings.recent_window is not None and not shortest <= window <= lengths[0]:
        raise ValueError(
            f"passkey.recent_window={window}: must lie between {shortest}, the tokens of a prompt without "
            f"filler, and {lengths[0]}, the shortest length"
        )
    furthest = settings.max_depth_length or RECALL_FACTOR * train_length
    recall_lengths = [n for n in lengths if n <= max(furthest, train_length)] if settings.depths else []
    return PasskeySuite(
        window=window,
        recent={n: passkey.recent_prompts(task, n, min(window, n), settings.prompts, seed) for n in lengths},
        recall={
            n: passkey.recall_prompts(task, n, settings.depths, settings.prompts_per_depth, seed)
            for n in recall_lengths
        },
    )


def plan_loss(config: EvaluateConfig, data: DataConfig, tokenizer: Tokenizer) -> LossSuite:
    """Choose the text: passkey prompts for a passkey checkpoint, held-out documents for one of documents.

    Raises:
        ValueError: the held-out documents are shorter than loss.length, or loss.bucket exceeds what it cuts.
    """
    settings, train_length = config.loss, data.train_length
    length, is_text = settings.length or LOSS_FACTOR * train_length, data.name == "documents"
    if settings.length is None and settings.max_length is not None:
        length = max(train_length, min(length, settings.max_length))
    if settings.length is None and is_text:
        length = min(length, len(losses.held_out_documents(data, tokenizer, config.split)) - 1)
    source, text = losses.held_out_text(data, tokenizer, config.split, length, settings.prompts, config.seed)
    bucket = settings.bucket or max(1, train_length // 4)
    if bucket > min(length, train_length):
        raise ValueError(
            f"loss.bucket={bucket}: exceeds {min(length, train_length)}, the shorter of the training length "
            "and loss.length; lower it"
        )
    unigram = losses.unigram_loss(source, min(train_length, length), length) if is_text else None
    return LossSuite(source, text, settings.prompts, length, bucket, unigram)

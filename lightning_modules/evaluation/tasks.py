"""The task suites: how much of its answers a model gets right by prompt length and, where they have a place,
by depth; with intervals, beside chance."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from conf.load import from_dict, to_dict
from conf.measure_schema import EvaluateConfig
from conf.schema import DataConfig
from conf.tasks import IN_TEXT, TasksConfig
from data.layout import Layout
from data.store import Stream
from data.tasks.registry import build_task
from data.tasks.task import Draw, Task
from data.tokenizers import Tokenizer
from lightning_modules.evaluation.answers import accuracy, score, tokens_to_read
from lightning_modules.evaluation.conclusion import LOST, SOLVED
from lightning_modules.evaluation.splits import draw_seed
from lightning_modules.evaluation.streaming import Reader
from lightning_modules.evaluation.suites import Rule
from lightning_modules.evaluation.texts import text_stream

STREAM = 0x7E55  # first word of every generator's seed: no training stream begins with it
FACTORS = (1, 2, 4, 8, 16)  # of the training length, without a setting


@dataclass(frozen=True)
class TaskSuite:
    """Prompts of one task at every length: `depths` of each of `texts` texts, whose text is read once."""

    name: str
    task: Task
    lengths: Sequence[int]
    depths: int
    texts: int
    seed: int
    train_length: int
    tokens: int

    def run(self, reader: Reader, rule: Rule) -> dict[str, Any]:
        """{"by_length", "by_depth": rows of evaluation.json, "tokens_read", "tokens_without_sharing",
        "summary"}."""
        by_length, by_depth, before = [], [], reader.tokens
        for length in self.lengths:
            reader.mitigation = rule(length)
            layout = prompts(self.task, length, self.depths, self.texts, self.seed)
            scores = score(reader, layout)
            known = {"length": length, "chance": self.task.chance(length)}
            by_length.append(known | accuracy(scores))
            placed = np.isfinite(layout.depth)
            bins = (np.nan_to_num(layout.depth) * self.depths).astype(int)
            for i in np.unique(bins[placed]):
                depth = (int(i) + 0.5) / self.depths
                by_depth.append(known | {"depth": depth} | accuracy(scores.select((bins == i) & placed)))
        alone = sum(self.depths * self.texts * (length - 1) for length in self.lengths)
        return {
            "by_length": by_length,
            "by_depth": by_depth,
            "tokens_read": reader.tokens - before,
            "tokens_without_sharing": alone,
            "summary": conclude(self.name, self.train_length, by_length),
        }


def prompts(task: Task, length: int, depths: int, texts: int, seed: int) -> Layout:
    """A prompt at each depth of every text. Texts, keys and depths depend on the seed alone."""
    draws = [
        Draw((STREAM, seed, text, 0), (STREAM, seed, text, 1, depth), (depth / depths, (depth + 1) / depths))
        for text in range(texts)
        for depth in range(depths)
    ]
    return task.layout(length, draws)


def plan_task(
    name: str, config: EvaluateConfig, data: DataConfig, tokenizer: Tokenizer, vocab_size: int
) -> TaskSuite:
    """Lay out the prompts once, to see that they fit.

    Raises:
        ValueError: a setting does not fit the model, a length is too short, the text is too short.
    """
    settings = config.tasks
    changed = from_dict(TasksConfig, to_dict(data.tasks) | dict(settings.settings))
    if (changed.vocabulary or 0) > vocab_size:
        raise ValueError(
            f"tasks.settings.vocabulary={changed.vocabulary}: the model has {vocab_size} token ids; lower it"
        )
    text: Stream | None = None
    if name in IN_TEXT:
        text = text_stream(config, data, tokenizer)
    task = build_task(name, replace(data, tasks=changed), tokenizer, text)
    lengths = sorted(set(settings.lengths or [factor * data.train_length for factor in FACTORS]))
    shortest = task.shortest()
    fits = [length for length in lengths if length >= shortest]
    if not fits or (settings.lengths and len(fits) < len(lengths)):
        raise ValueError(
            f"tasks.lengths={lengths}: a prompt of {name} needs at least {shortest} tokens here; "
            "give longer ones or drop it from suites"
        )
    seed, shape = draw_seed(config.seed, config.split), (settings.depths, settings.prompts_per_depth)
    tokens = sum(tokens_to_read(prompts(task, length, *shape, seed)) for length in fits)
    return TaskSuite(name, task, fits, *shape, seed, data.train_length, tokens)


def conclude(name: str, train_length: int, by_length: Sequence[dict[str, Any]]) -> str:
    """Up to which length a task is solved; whether what is left is more than chance."""
    first, last = by_length[0], by_length[-1]
    at = "the training length" if first["length"] == train_length else f"{first['length']:,} tokens"
    said = f"{name}: {first['accuracy']:.2f} of answers right at {at} (chance {_chance(first)})"
    if first["accuracy"] < SOLVED:
        return f"{said}: unsolved, below {SOLVED}." + _against_chance([first])
    lost = next((row for row in by_length if row["accuracy"] <= LOST), None)
    if lost is None:
        return f"{said}, {last['accuracy']:.2f} at {last['length']:,}."
    said += f", at most {LOST} from {lost['length']:,} tokens on."
    return said + _against_chance(by_length[by_length.index(lost) :])


def _against_chance(rows: Sequence[dict[str, Any]]) -> str:
    guesses = [row["length"] for row in rows if row["accuracy_low"] <= row["chance"]]
    return f" No better than chance at {', '.join(f'{n:,}' for n in guesses)} tokens." if guesses else ""


def _chance(row: dict[str, Any]) -> str:
    return f"{row['chance']:.3f}" if row["chance"] >= 0.001 else f"{row['chance']:.0e}"


def metrics(tasks: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Flat names -> numbers, for result.json and the tracking store."""
    return {
        f"{name}/{kind}_at_{row['length']}": float(row[kind])
        for name, measured in tasks.items()
        for row in measured["by_length"]
        for kind in ("accuracy", "exact", "chance")
    }

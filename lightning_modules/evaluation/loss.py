"""Loss by position on long text, averaged over prompts and over buckets of neighbouring positions."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from conf.schema import DataConfig
from conf.tasks import IN_TEXT
from data.batches import Source as Samples
from data.opened import Documents
from data.store import Stream
from data.tasks.registry import build_source
from data.tokenizers import Tokenizer
from lightning_modules.evaluation.splits import Split, draw_seed, part_of
from lightning_modules.evaluation.streaming import Reader, Source

PIECE = 2**14  # positions counted at a time
STREAM = 0x7E58  # first word of the generator's seed: no training stream begins with it


def prompts_source(task: Samples, train_length: int, prompts: int, seed: int, field: str = "ids") -> Source:
    """Prompts of a task, of the training length, one after another, each with a key of its own.

    Every stretch of one training length is text as in training, so what differs between stretches is only
    how much came before. Filler alone would not do: with time the model rightly expects needle and question.
    Text behind an answer is new to the model, so the first stretch beyond the training length overstates.

    field: "answer" gives, in place of each token, whether the one behind it is a digit of an answer.
    """

    def source(begin: int, end: int) -> NDArray[np.int64]:
        first, last = begin // train_length, -(-end // train_length)
        rows = [
            task.sample(train_length, range(i * prompts, (i + 1) * prompts), (STREAM, seed))[field].numpy()
            for i in range(first, last)
        ]
        return np.concatenate(rows, 1)[:, begin - first * train_length : end - first * train_length]

    return source


def held_out_text(
    data: DataConfig,
    tokenizer: Tokenizer,
    split: Split,
    length: int,
    prompts: int,
    seed: int,
    name: str = "loss.length",
) -> tuple[Source, str]:
    """`prompts` texts of `length` tokens as in training, which it never saw, and what they are.

    Raises ValueError where the split's documents are shorter than `length`, the setting `name`.
    """
    seed = draw_seed(seed, split)
    if data.name != "documents":
        source = prompts_source(task_of(data, tokenizer, split), data.train_length, prompts, seed)
        return source, f"{data.name} prompts, one after another"
    stream = held_out_documents(data, tokenizer, split)
    return documents_source(stream, length, prompts, seed, name), "held-out documents"


def task_of(data: DataConfig, tokenizer: Tokenizer, split: Split) -> Samples:
    """The task `data.name`. One in documents hides its needles in those of a split."""
    text = held_out_documents(data, tokenizer, split) if data.name in IN_TEXT else None
    return build_source(data, tokenizer, text)


def held_out_documents(data: DataConfig, tokenizer: Tokenizer, split: Split = "test") -> Stream:
    """Of the documents that the training run on `data` never saw, tokenised, those of a split."""
    return part_of(Documents(data, tokenizer).held_out(), split)


def documents_source(
    stream: Stream, length: int, prompts: int, seed: int, name: str = "loss.length"
) -> Source:
    """Stretches of the stream from evenly spaced places, behind a random offset.

    A stretch runs over the ends of documents and the state is carried across them: what is measured is a
    model that reads on and on.

    Raises:
        ValueError: the stream is too short to hold `length`, the setting `name`, without repeating itself.
    """
    if length >= len(stream):
        raise ValueError(
            f"{name}={length}: the held-out documents of this split have only {len(stream)} tokens; shorten "
            "it, or give the training run more documents or a larger data.documents.val_fraction"
        )
    offset = np.random.default_rng([STREAM, seed]).integers(len(stream))
    first = offset + np.arange(prompts)[:, None] * (len(stream) // prompts)
    return lambda begin, end: stream.take(first + np.arange(begin, end))


def loss_by_position(reader: Reader, source: Source, length: int, bucket: int) -> dict[str, Any]:
    """Mean -log p, in nats, of tokens 1 .. length by buckets of `bucket` positions, as `bucketed`."""
    return bucketed(reader.losses(source, length), length, bucket)


def bucketed(segments: Iterable[tuple[int, Tensor]], length: int, bucket: int) -> dict[str, Any]:
    """Losses of tokens 1 .. length, in segments (position of the first, (n, w)), by buckets of positions.

    Returns:
        {"bucket", "position": middle of each bucket, "loss": mean over its tokens and all prompts,
        "error": standard error of that mean from prompt to prompt (None of one prompt), "non_finite"}.
        A bucket that met a NaN or an infinity, or was not reached, holds None.
    """
    n_buckets = -(-length // bucket)
    total, count = np.zeros((1, n_buckets)), np.zeros(n_buckets)
    for first, losses in segments:
        by_position = losses.double().cpu().numpy()
        if not count.any():
            total = np.zeros((len(by_position), n_buckets))
        index = np.arange(first - 1, first - 1 + by_position.shape[1]) // bucket
        np.add.at(total.T, index, by_position.T)
        np.add.at(count, index, 1)
    starts = np.arange(n_buckets) * bucket
    position = (starts + 1 + np.minimum(starts + bucket, length)) / 2
    by_prompt = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    mean, prompts = by_prompt.mean(0), len(by_prompt)
    with np.errstate(invalid="ignore"):  # infinities
        error = by_prompt.std(0, ddof=1) / np.sqrt(prompts) if prompts > 1 else np.full(n_buckets, np.nan)
    return {
        "bucket": bucket,
        "position": position.tolist(),
        "loss": _or_none(mean),
        "error": _or_none(error),
        "non_finite": not np.isfinite(mean).all(),
    }


def unigram_loss(source: Source, train_length: int, length: int) -> float:
    """-log p, in nats, of tokens 1 .. train_length under the frequencies of tokens 1 .. `length` of these
    very texts: what is known without reading anything. Fitted to what it is asked, so a little too good."""
    counts, inside = np.zeros(0), np.zeros(0)
    for low in range(1, length + 1, PIECE):
        ids = source(low, min(low + PIECE, length + 1))
        counts = _add(counts, np.bincount(ids.ravel()))
        inside = _add(inside, np.bincount(ids[:, : max(0, train_length + 1 - low)].ravel()))
    met = inside > 0
    return float(-(inside[met] * np.log(counts[: len(inside)][met] / counts.sum())).sum() / inside.sum())


def _add(total: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    size = max(len(total), len(counts))
    return np.pad(total, (0, size - len(total))) + np.pad(counts, (0, size - len(counts)))


def _or_none(values: NDArray[np.float64]) -> list[float | None]:
    return [float(x) if np.isfinite(x) else None for x in values]

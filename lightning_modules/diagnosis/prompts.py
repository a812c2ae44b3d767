"""Prompts to stream through a model: any length, written out on demand."""

import numpy as np
from numpy.typing import NDArray

from conf.measure_schema import DiagnoseConfig
from conf.schema import DataConfig
from data.filler import Filler
from data.tokenizers import Tokenizer
from lightning_modules.evaluation.loss import documents_source, held_out_documents, held_out_text
from lightning_modules.evaluation.streaming import Source

STREAM = 0xD1A6  # first word of the generator's seed: no training stream begins with it
RANDOM_BLOCK = 1024  # random tokens drawn together

DESCRIPTIONS = {
    "newline": "a newline, repeated",
    "sentence": "one sentence, repeated",
    "random": "random tokens",
    "documents": "held-out documents",
    "passkey": "the passkey task's filler",
    "task": "prompts of the task, one after another",
}


def choose_prompt(config: DiagnoseConfig, data: DataConfig) -> str:
    """The prompt's name: the setting, or what the checkpoint was trained on."""
    if config.prompt != "auto":
        return config.prompt
    return data.name if data.name in ("passkey", "documents") else "task"


def prompt_source(name: str, config: DiagnoseConfig, data: DataConfig, tokenizer: Tokenizer) -> Source:
    """`config.prompts` rows of the prompt `name`; of newlines one row, since all would be equal.

    Raises:
        ValueError: the held-out documents are too short.
    """
    if name == "newline":
        return repeat(tokenizer.encode("\n"), 1)
    if name == "sentence":
        return repeat(tokenizer.encode(config.sentence), config.prompts)
    if name == "passkey":
        return filler_source(tokenizer, config.prompts)
    if name == "random":
        return random_source(tokenizer.vocab_size, config.prompts, config.seed)
    length = config.length_for(data.train_length)
    if name == "task":
        return held_out_text(data, tokenizer, "test", length, config.prompts, config.seed)[0]
    stream = held_out_documents(data, tokenizer)
    return documents_source(stream, length, config.prompts, config.seed, "length")


def filler_source(tokenizer: Tokenizer, rows: int) -> Source:
    """What passkey prompts are full of, without needle and question."""
    return repeat(Filler(tokenizer).ids, rows)


def repeat(ids: NDArray[np.int64], rows: int) -> Source:
    """`ids` over and over; the rows begin at evenly spaced places of it."""
    phase = (np.arange(rows) * len(ids) // rows)[:, None]
    return lambda begin, end: ids[(np.arange(begin, end) + phase) % len(ids)]


def random_source(vocab_size: int, rows: int, seed: int) -> Source:
    """Independent tokens, uniform over the vocabulary; any stretch is cut from one fixed text."""

    def source(begin: int, end: int) -> NDArray[np.int64]:
        first, last = begin // RANDOM_BLOCK, -(-end // RANDOM_BLOCK)
        blocks = [
            np.random.default_rng([STREAM, seed, block]).integers(vocab_size, size=(rows, RANDOM_BLOCK))
            for block in range(first, last)
        ]
        return np.concatenate(blocks, 1)[:, begin - first * RANDOM_BLOCK : end - first * RANDOM_BLOCK]

    return source

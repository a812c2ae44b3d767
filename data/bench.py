"""Tokens/s of CPU time: documents read, tokenised, and cut into rows, beside what training needs.

    python -m data.bench [documents.source=PATH] [tokenizer=FOLDER] [key=value ...]

CPU time of this process and all its threads, so that other work on the machine disturbs little; in a scratch
folder, nothing of the cache is used or changed. A core is one second of CPU time a second.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from conf.data_bench_schema import DataBenchConfig
from conf.load import from_command_line, user_errors


def measure(config: DataBenchConfig) -> Iterator[tuple[str, int, float]]:
    """(what, tokens, CPU seconds) of each."""
    from data.documents import PackedDocuments
    from data.parts import PartMaker
    from data.sources import locate
    from data.store import build_store
    from data.streaming import StreamedDocuments
    from data.tokenise import hash_text
    from data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(config.tokenizer)
    corpus = locate(replace(config.documents, streaming=False, processes=1))
    tokenizer.encode("warm")
    began = time.process_time()
    for text in corpus.texts():
        hash_text(text)
    reading = time.process_time() - began
    with tempfile.TemporaryDirectory() as scratch:
        began = time.process_time()
        maker = PartMaker(corpus, tokenizer, Path(scratch), held_out=False)
        counts = [maker.make(i, piece).counts for i, piece in enumerate(corpus.pieces(2**25))]
        tokenising = time.process_time() - began
    tokens = sum(count["tokens"] for count in counts)
    yield "read and hashed", tokens, reading
    yield "read, hashed, tokenised, written", tokens, tokenising
    stream = build_store(corpus, tokenizer).split(config.documents.val_fraction)[0]
    step = config.batch_size * config.train_length
    streamed = StreamedDocuments(
        locate(replace(config.documents, streaming=True, deduplicate=False, max_tokens=None, processes=None)),
        tokenizer,
        step,
        [config.train_length],
    )
    for name, source in (("rows of the cache", PackedDocuments(stream)), ("rows of a stream", streamed)):
        began = time.process_time()
        for i in range(config.steps):
            rows = range(i * config.batch_size, (i + 1) * config.batch_size)
            source.sample(config.train_length, rows, (0, 0, config.train_length))
        yield name, config.steps * step, time.process_time() - began


def main() -> None:
    assert __doc__ is not None
    config = from_command_line(DataBenchConfig, __doc__)
    with user_errors(), tempfile.TemporaryDirectory() as cache:
        import datasets

        datasets.config.HF_DATASETS_CACHE = Path(cache)
        table = Table("what", "tokens", "tokens/s a core", f"x {config.need:,.0f} tokens/s")
        results = {}
        for name, tokens, seconds in measure(config):
            speed = tokens / max(seconds, 1e-9)
            results[name] = {"tokens": tokens, "cpu_seconds": seconds, "tokens_per_core_second": speed}
            table.add_row(name, f"{tokens:,}", f"{speed:,.0f}", f"{speed / config.need:,.1f}")
        Console(width=110).print(table)
        if config.json is not None:
            Path(config.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

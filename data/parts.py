"""One piece of a corpus -> one part on disk: tokens of the documents that pass, and where each lies.

A part is `NAME.bin`, and `NAME.npz` written last: where that is, the part is whole, and not made again.
"""

import contextlib
import multiprocessing
import os
import threading
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.progress import WorkProgress
from data.sources import Corpus, Piece
from data.tokenise import hash_text, is_held_out, normalise, tokenise
from data.tokenizers import Tokenizer

COUNTS = ("documents", "tokens", "shorter", "shorter_tokens", "longer", "longer_tokens", "not_utf8")


@dataclass(frozen=True)
class Part:
    """starts, stops (n,): where each document lies in the part's tokens; hashes (n,) of its text, and `same`
    (n,) of its normalised text (empty unless duplicates are wanted). counts: of all that was read.
    """

    path: Path
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    same: NDArray[np.uint64]
    counts: dict[str, int]


@dataclass
class PartMaker:
    """How every piece is tokenised. held_out: keep documents of validation alone."""

    corpus: Corpus
    tokenizer: Tokenizer
    folder: Path
    held_out: bool

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.min_scalar_type(max(self.tokenizer.vocab_size - 1, self.tokenizer.eos_id))

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}"

    def load(self, number: int) -> Part | None:
        """The part, if it is whole already."""
        path = self.path(number)
        try:
            with np.load(path.with_suffix(".npz")) as file:
                counts = dict(zip(COUNTS, file["counts"].tolist(), strict=True))
                return Part(path, file["starts"], file["stops"], file["hashes"], file["same"], counts)
        except FileNotFoundError:
            return None

    def make(self, number: int, piece: Piece) -> Part:
        """Memory: one document, one group of texts, 24 bytes a document kept (32 to deduplicate)."""
        config, counts = self.corpus.config, Counter[str]()
        starts, stops = array("q"), array("q")  # 8 bytes a number, unlike a list
        hashes, same = array("Q"), array("Q")
        not_utf8 = len(self.corpus.not_utf8)
        path = self.path(number)
        start = position = kept = 0
        scratch = self.folder / f"{number:06d}-{os.getpid()}"
        with open(scratch.with_suffix(".bin"), "wb") as file:
            for ids, tag in tokenise(self._tagged(piece), self.tokenizer):
                ids.astype(self.dtype).tofile(file)
                position += len(ids)
                if tag is None:
                    continue
                length = position - start
                counts["documents"] += 1
                counts["tokens"] += length
                longest = config.max_document_tokens
                if length < config.min_tokens or (longest is not None and length > longest):
                    why = "shorter" if length < config.min_tokens else "longer"
                    counts[why] += 1
                    counts[f"{why}_tokens"] += length
                    start = position  # no document claims what was written
                    continue
                np.array([self.tokenizer.eos_id], self.dtype).tofile(file)
                position += 1
                starts.append(start)
                stops.append(position)
                hashes.append(tag[0])
                if tag[1] is not None:
                    same.append(tag[1])
                kept += position - start
                start = position
                if config.max_tokens is not None and kept >= config.max_tokens:
                    break
        counts["not_utf8"] = len(self.corpus.not_utf8) - not_utf8
        totals = {name: counts[name] for name in COUNTS}
        arrays = [np.asarray(a) for a in (starts, stops, hashes, same)]
        part = Part(path, arrays[0], arrays[1], arrays[2], arrays[3], totals)
        np.savez(
            scratch.with_suffix(".npz"),
            counts=np.array(list(totals.values())),
            starts=part.starts,
            stops=part.stops,
            hashes=part.hashes,
            same=part.same,
        )
        for suffix in (".bin", ".npz"):
            os.replace(scratch.with_suffix(suffix), path.with_suffix(suffix))
        return part

    def _tagged(self, piece: Piece) -> Iterator[tuple[str, tuple[int, int | None]]]:
        config = self.corpus.config
        for text in self.corpus.read(piece):
            text_hash = hash_text(text)
            if not self.held_out or is_held_out(text_hash, config.val_fraction):
                yield text, (text_hash, hash_text(normalise(text)) if config.deduplicate else None)


def make_parts(maker: PartMaker, pieces: list[Piece], processes: int) -> Iterator[Part]:
    """The part of every piece, in order; those that an earlier run finished are not made again.

    Raises:
        ValueError: a piece cannot be read, or a process died.
        OSError: a part cannot be written.
    """
    with (
        WorkProgress(f"tokenising {maker.corpus.name}", len(pieces)) as progress,
        contextlib.ExitStack() as stack,
    ):
        missing = [i for i in range(len(pieces)) if maker.load(i) is None]
        processes = min(processes, len(missing))
        pool = stack.enter_context(_pool(maker, processes)) if processes > 1 else None
        ahead: dict[int, Future[Part]] = {}
        queue = iter(missing)
        for number, piece in enumerate(pieces):
            if pool is not None:
                # Not all at once: a corpus cut short by max_tokens is not read to its end.
                while len(ahead) < 2 * processes and (i := next(queue, None)) is not None:
                    ahead[i] = pool.submit(_make, i, pieces[i])
            part = maker.load(number)
            before = part is not None and number not in ahead
            if number in ahead:
                try:
                    part = ahead.pop(number).result()
                except BrokenProcessPool:
                    raise ValueError(
                        f"data.documents.processes={processes}: a process that tokenised died, perhaps "
                        "for lack of memory; try fewer: what is tokenised is kept"
                    ) from None
            if part is None:
                part = maker.make(number, piece)
            progress.advance(None if before else part.counts["tokens"])
            yield part


@contextlib.contextmanager
def _pool(maker: PartMaker, processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with ours, however it ends."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(maker,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_maker: PartMaker


def _begin(maker: PartMaker) -> None:
    global _maker
    _maker = maker
    os.environ["RAYON_NUM_THREADS"] = "1"  # of tokenizers: the processes are enough for the cores
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=end_with, args=(parent.sentinel,), daemon=True).start()


def _make(number: int, piece: Piece) -> Part:
    return _maker.make(number, piece)

"""Documents tokenised once into one flat file, then memory-mapped: reading needs no memory, at any size.

A store is a folder below Hugging Face's datasets cache, shared by all runs that read the same corpus:

    tokens.bin    every document followed by one end-of-text token
    ends.npy      (n,) where each document ends in tokens.bin
    hashes.npy    (n,) 64-bit hash of each document's text, ascending
    meta.json     counts, dtype, and a hash of the content

Documents lie in the order of their hashes. That shuffles them, whatever order they came in, and makes the
validation split a prefix: a document and its exact copies always fall on the same side.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.sources import Corpus
from data.tokenizers import Tokenizer

FORMAT = 1  # of the folder; a change makes new stores
PIECE = 2**20  # characters tokenised at once: bounds memory on huge documents
GROUP = 2**23  # characters tokenised in one parallel call


@dataclass(frozen=True)
class TokenStream:
    """Tokens [start, stop) of a store, read as a ring: position `stop - start` is position 0 again.

    Picklable and cheap to copy to worker processes: the file is mapped at first use.
    """

    folder: Path
    dtype: str
    eos_id: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @cached_property
    def _tokens(self) -> NDArray[Any]:
        return np.memmap(self.folder / "tokens.bin", self.dtype, mode="r")[self.start : self.stop]

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.load(self.folder / "ends.npy", mmap_mode="r")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_tokens", "_ends")}

    def documents(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(position of the first token, tokens without the end) of every document that lies whole in it."""
        ends = np.load(self.folder / "ends.npy")
        starts = np.append(0, ends[:-1])
        whole = (starts >= self.start) & (ends <= self.stop)
        return starts[whole] - self.start, (ends - starts)[whole] - 1

    def take(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens at any integer positions, int64 of their shape."""
        return self._tokens.take(positions, mode="wrap").astype(np.int64)

    def locate(self, position: int) -> tuple[int, int]:
        """(document, token of it) at a position: documents as the store counts them, both from 0."""
        place = self.start + position % len(self)
        document = int(np.searchsorted(self._ends, place, side="right"))
        return document, place - (int(self._ends[document - 1]) if document else 0)


@dataclass(frozen=True)
class TokenStore:
    """An opened store."""

    folder: Path
    meta: dict[str, Any]

    @property
    def content(self) -> str:
        """Hash of the documents and of the tokenizer: equal contents give equal samples."""
        return self.meta["content"]

    def whole(self) -> TokenStream:
        """All documents."""
        return TokenStream(self.folder, self.meta["dtype"], self.meta["eos_id"], 0, self.meta["tokens"])

    def split(self, val_fraction: float) -> tuple[TokenStream, TokenStream]:
        """(training, validation) streams that share no document.

        A corpus of one document is cut: its first `val_fraction` is held out.
        """
        ends = np.load(self.folder / "ends.npy", mmap_mode="r")
        hashes = np.load(self.folder / "hashes.npy", mmap_mode="r")
        if len(ends) == 1:
            cut = min(max(int(ends[0] * val_fraction), 1), int(ends[0]) - 1)
        else:
            held_out = int(np.searchsorted(hashes, np.uint64(val_fraction * 2.0**64)))
            cut = int(ends[min(max(held_out, 1), len(ends) - 1) - 1])
        dtype, eos_id = self.meta["dtype"], self.meta["eos_id"]
        validation = TokenStream(self.folder, dtype, eos_id, 0, cut)
        return TokenStream(self.folder, dtype, eos_id, cut, int(ends[-1])), validation


def locate_store(corpus: Corpus, tokenizer: Tokenizer) -> Path:
    """The folder of the corpus' store, whether it exists or not."""
    from datasets import config

    limits = [corpus.config.min_tokens, corpus.config.max_tokens]
    key = json.dumps([FORMAT, corpus.identity(), limits, tokenizer.fingerprint])
    return Path(config.HF_DATASETS_CACHE) / "longstate" / hashlib.sha256(key.encode()).hexdigest()[:24]


def build_store(corpus: Corpus, tokenizer: Tokenizer) -> TokenStore:
    """Open the corpus' store; tokenise the corpus first if no run has done so yet.

    Concurrent callers wait for the first one. A killed build leaves no store, only a scratch folder.

    Raises:
        ValueError: the corpus has no document of at least min_tokens, or the store cannot be written.
    """
    folder = locate_store(corpus, tokenizer)
    if not (folder / "meta.json").is_file():
        with _writable(folder.parent), _lock(folder.with_suffix(".lock")):
            if not (folder / "meta.json").is_file():
                with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                    _write(Path(scratch, "store"), corpus, tokenizer)
                    _publish(Path(scratch, "store"), folder)
    return TokenStore(folder, json.loads((folder / "meta.json").read_text()))


def _write(folder: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    folder.mkdir()
    dtype = np.min_scalar_type(max(tokenizer.vocab_size - 1, tokenizer.eos_id))
    starts, stops, hashes = array("q"), array("q"), array("Q")  # 8 bytes a number, unlike a list
    start = position = tokens = shorter = 0
    unsorted = folder / "unsorted.bin"
    with open(unsorted, "wb") as file:
        for ids, text_hash in _tokenise(corpus.texts(), tokenizer):
            ids.astype(dtype).tofile(file)
            position += len(ids)
            if text_hash is None:
                continue
            if position - start < corpus.config.min_tokens:
                shorter += 1
                start = position  # no document claims what was written
                continue
            np.array([tokenizer.eos_id], dtype).tofile(file)
            position += 1
            starts.append(start)
            stops.append(position)
            hashes.append(text_hash)
            tokens += position - start
            start = position
            if corpus.config.max_tokens is not None and tokens >= corpus.config.max_tokens:
                break
    if not hashes:
        raise ValueError(
            f"data.documents.source={corpus.config.source}: {shorter} documents, none of at least "
            f"data.documents.min_tokens={corpus.config.min_tokens} tokens; lower it or name another source"
        )
    order = np.argsort(np.asarray(hashes), kind="stable")
    with open(unsorted, "rb") as source, open(folder / "tokens.bin", "wb") as file:
        for i in order.tolist():
            source.seek(starts[i] * dtype.itemsize)
            file.write(source.read((stops[i] - starts[i]) * dtype.itemsize))
    unsorted.unlink()
    ends = np.cumsum((np.asarray(stops) - np.asarray(starts))[order])
    sorted_hashes = np.asarray(hashes)[order]
    np.save(folder / "ends.npy", ends)
    np.save(folder / "hashes.npy", sorted_hashes)
    content = hashlib.sha256(sorted_hashes.tobytes() + ends.tobytes() + tokenizer.fingerprint.encode())
    meta = {
        "documents": len(hashes),
        "tokens": tokens,
        "shorter_than_min_tokens": shorter,
        "files_not_utf8": len(corpus.not_utf8),
        "dtype": dtype.name,
        "eos_id": tokenizer.eos_id,
        "content": content.hexdigest(),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _tokenise(texts: Iterator[str], tokenizer: Tokenizer) -> Iterator[tuple[NDArray[np.int64], int | None]]:
    """Tokens of every text, piece after piece; with its last piece the 64-bit hash of the text, else None."""
    pieces = ((piece, text_hash) for text in texts for piece, text_hash in _cut(text))
    for group in _group(pieces):
        encoded = tokenizer.encode_batch([piece for piece, _ in group])
        yield from zip(encoded, (text_hash for _, text_hash in group), strict=True)


def _cut(text: str) -> Iterator[tuple[str, int | None]]:
    """Pieces of at most PIECE characters, cut at a line's end where there is one; the last with the hash."""
    digest = hashlib.blake2b(digest_size=8)
    start = 0
    while start < len(text):
        stop = len(text)
        if stop - start > PIECE:
            stop = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        piece = text[start:stop]
        digest.update(piece.encode("utf-8", errors="replace"))
        start = stop
        yield piece, int.from_bytes(digest.digest(), "big") if stop == len(text) else None


def _group(pieces: Iterable[tuple[str, int | None]]) -> Iterator[list[tuple[str, int | None]]]:
    """Pieces in lists of about GROUP characters."""
    group, size = [], 0
    for piece in pieces:
        group.append(piece)
        size += len(piece[0])
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ValueError(
            f"data.documents: cannot write the token cache {folder} ({error}); "
            "set HF_DATASETS_CACHE to a writable folder with space"
        ) from None


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system releases it when that process dies."""
    with open(path, "w") as file:
        # A file system without locks costs a second build at worst: publishing is atomic.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _publish(scratch: Path, folder: Path) -> None:
    try:
        os.rename(scratch, folder)
    except OSError:
        if not (folder / "meta.json").is_file():  # otherwise another process was first
            raise

"""Documents tokenised once into one Arrow file, then memory-mapped: reading needs no memory, at any size.

A store is a folder below Hugging Face's datasets cache, shared by all runs that read the same corpus:

    tokens.arrow  a row a document, its tokens followed by one end-of-text token
    ends.npy      (n,) where each document ends among all tokens
    hashes.npy    (n,) 64-bit hash of each document's text, ascending
    meta.json     counts, dtype, and a hash of the content

Documents lie in the order of their hashes. That shuffles them, whatever order they came in, and makes the
validation split a prefix: a document and its exact copies always fall on the same side.

Building needs memory for about 70 bytes a document kept, and disk for its tokens twice. Beside the store lies
`NAME.partial` while it is built: a build that is killed goes on from there (data/parts.py).
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.arrow import ArrowTokens, write_arrow
from data.parts import COUNTS, Part, PartMaker, make_parts
from data.sources import Corpus
from data.tokenizers import Tokenizer

FORMAT = 2  # of the folder; a change makes new stores
PIECE_BYTES = 2**25  # of text, tokenised by one process at a time; what a kill loses
MOST_PIECES = 500  # all of a store's parts are open at once


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
    def _tokens(self) -> ArrowTokens:
        return ArrowTokens(self.folder / "tokens.arrow", self.dtype)

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
        return self._tokens.take(self.start + positions % len(self)).astype(np.int64)

    def locate(self, position: int) -> tuple[int, int]:
        """(document, token of it) at a position: documents as the store counts them, both from 0."""
        place = self.start + position % len(self)
        document = int(np.searchsorted(self._ends, place, side="right"))
        return document, place - (int(self._ends[document - 1]) if document else 0)


@dataclass(frozen=True)
class JoinedStreams:
    """Several streams read one after another, with the same methods."""

    parts: tuple[TokenStream, ...]

    @classmethod
    def of(cls, streams: Sequence[TokenStream]) -> "JoinedStreams | TokenStream":
        return streams[0] if len(streams) == 1 else cls(tuple(streams))

    @property
    def eos_id(self) -> int:
        return self.parts[0].eos_id

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def documents(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """As `TokenStream.documents`."""
        found, first = [], 0
        for part in self.parts:
            starts, sizes = part.documents()
            found.append((starts + first, sizes))
            first += len(part)
        starts, sizes = (np.concatenate(column) for column in zip(*found, strict=True))
        return starts, sizes

    def take(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """As `TokenStream.take`."""
        positions = positions % len(self)
        tokens = np.empty_like(positions)
        first = 0
        for part in self.parts:
            mine = (positions >= first) & (positions < first + len(part))
            tokens[mine] = part.take(positions[mine] - first)
            first += len(part)
        return tokens


Stream = TokenStream | JoinedStreams


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


def cache_folder() -> Path:
    """Where all runs keep what they tokenised."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "longstate"


def locate_store(corpus: Corpus, tokenizer: Tokenizer, held_out: bool = False) -> Path:
    """The folder of the corpus' store, whether it exists or not."""
    config = corpus.config
    limits = [config.min_tokens, config.max_document_tokens, config.deduplicate, config.max_tokens]
    side = config.val_fraction if held_out else None
    key = json.dumps([FORMAT, corpus.identity(), limits, side, tokenizer.fingerprint])
    return cache_folder() / hashlib.sha256(key.encode()).hexdigest()[:24]


def build_store(corpus: Corpus, tokenizer: Tokenizer, held_out: bool = False) -> TokenStore:
    """Open the corpus' store; tokenise the corpus first if no run has done so yet.

    held_out: a store of the documents of validation alone; none of the others is tokenised.

    Concurrent callers wait for the first one. A killed build leaves no store: the next one finishes it.

    Raises:
        ValueError: no document of the corpus passes the filters, or the store cannot be written.
    """
    folder = locate_store(corpus, tokenizer, held_out)
    if not (folder / "meta.json").is_file():
        with writable(folder.parent), _lock(folder.with_suffix(".lock")):
            if not (folder / "meta.json").is_file():
                scratch = folder.with_suffix(".partial")
                scratch.mkdir(exist_ok=True)
                _write(scratch, corpus, tokenizer, held_out)
                _publish(scratch / "store", folder)
                shutil.rmtree(scratch, ignore_errors=True)
    return TokenStore(folder, json.loads((folder / "meta.json").read_text()))


def kept_line(corpus: Corpus, store: TokenStore) -> str:
    """What the filters have kept of a corpus, for people."""
    meta, config = store.meta, corpus.config
    read, read_tokens = meta["documents_read"], meta["tokens_read"]
    limits = [f"{meta['shorter']:,} below min_tokens={config.min_tokens:,}"]
    if config.max_document_tokens is not None:
        limits.append(f"{meta['longer']:,} above max_document_tokens={config.max_document_tokens:,}")
    if config.deduplicate:
        limits.append(f"{meta['duplicates']:,} duplicates")
    if meta["beyond"]:
        limits.append(f"{meta['beyond']:,} beyond max_tokens={config.max_tokens:,}")
    return (
        f"{corpus.name}: kept {meta['documents']:,} of {read:,} documents ({meta['documents'] / read:.1%}), "
        f"{meta['tokens']:,} tokens ({(meta['tokens'] - meta['documents']) / read_tokens:.1%}); left out: "
        f"{', '.join(limits)}, {meta['not_utf8']:,} files not UTF-8"
    )


def _write(scratch: Path, corpus: Corpus, tokenizer: Tokenizer, held_out: bool) -> None:
    config = corpus.config
    maker = PartMaker(corpus, tokenizer, scratch, held_out)
    size = max(PIECE_BYTES, corpus.size // MOST_PIECES)
    cores = int(os.environ.get("SLURM_CPUS_PER_TASK") or os.cpu_count() or 1)
    parts: list[Part] = []
    tokens = 0
    for part in make_parts(maker, corpus.pieces(size), config.processes or cores):
        parts.append(part)
        tokens += int((part.stops - part.starts).sum())
        if config.max_tokens is not None and tokens >= config.max_tokens:
            break
    counts = {name: sum(part.counts[name] for part in parts) for name in COUNTS}
    which = np.repeat(np.arange(len(parts)), [len(part.starts) for part in parts])
    starts, lengths, hashes = (
        np.concatenate([np.zeros(0, dtype), *(get(part) for part in parts)])
        for dtype, get in (
            (np.int64, lambda part: part.starts),
            (np.int64, lambda part: part.stops - part.starts),
            (np.uint64, lambda part: part.hashes),
        )
    )
    keep = np.arange(len(hashes))
    if config.max_tokens is not None:
        keep = keep[: np.searchsorted(np.cumsum(lengths), config.max_tokens) + 1]
    within = len(keep)
    if config.deduplicate:
        same = np.concatenate([part.same for part in parts])[keep]
        keep = np.sort(np.unique(same, return_index=True)[1])  # the first of each, as they came
    if not len(keep):
        raise ValueError(_nothing_kept(corpus, counts, held_out))
    keep = keep[np.argsort(hashes[keep], kind="stable")]
    hashes, ends = hashes[keep], np.cumsum(lengths[keep])
    store = scratch / "store"
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir()
    places = zip(which[keep].tolist(), starts[keep].tolist(), lengths[keep].tolist(), strict=True)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(part.path.with_suffix(".bin"), "rb")) for part in parts]
        write_arrow(store / "tokens.arrow", _gather(files, places, maker.dtype), maker.dtype)
    np.save(store / "ends.npy", ends)
    np.save(store / "hashes.npy", hashes)
    content = hashlib.sha256(hashes.tobytes() + ends.tobytes() + tokenizer.fingerprint.encode())
    meta = {
        "documents": len(hashes),
        "tokens": int(ends[-1]),
        "documents_read": counts["documents"],
        "tokens_read": counts["tokens"],
        "shorter": counts["shorter"],
        "longer": counts["longer"],
        "duplicates": within - len(keep),
        "beyond": len(which) - within,
        "not_utf8": counts["not_utf8"],
        "dtype": maker.dtype.name,
        "eos_id": tokenizer.eos_id,
        "content": content.hexdigest(),
    }
    (store / "meta.json").write_text(json.dumps(meta, indent=1))


def _gather(
    files: list[Any], places: Iterator[tuple[int, int, int]], dtype: np.dtype[Any]
) -> Iterator[NDArray[Any]]:
    for which, start, length in places:
        files[which].seek(start * dtype.itemsize)
        yield np.frombuffer(files[which].read(length * dtype.itemsize), dtype)


def _nothing_kept(corpus: Corpus, counts: dict[str, int], held_out: bool) -> str:
    config = corpus.config
    limits = f"of at least data.documents.min_tokens={config.min_tokens} tokens"
    remedy = "lower it or name another source"
    if config.max_document_tokens is not None:
        limits += f" and at most data.documents.max_document_tokens={config.max_document_tokens}"
        remedy = "widen the limits or name another source"
    if held_out:
        limits += f" that data.documents.val_fraction={config.val_fraction} holds out"
    return f"data.documents.source={config.source}: {counts['documents']} documents, none {limits}; {remedy}"


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ValueError(
            f"data.documents: cannot write the token cache {folder} ({error}); make room, or set "
            "HF_DATASETS_CACHE to a writable folder with space; what is tokenised is kept"
        ) from None


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system releases it when that process dies."""
    with open(path, "w") as file:
        # A file system without locks: two builds can stop each other, yet what is published is whole.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _publish(scratch: Path, folder: Path) -> None:
    try:
        os.rename(scratch, folder)
    except OSError:
        if not (folder / "meta.json").is_file():  # otherwise another process was first
            raise

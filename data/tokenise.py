"""Texts -> tokens, document after document: hashes, held-out side, pieces of huge documents, batches."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from data.tokenizers import Tokenizer

T = TypeVar("T")
PIECE = 2**20  # characters tokenised at once: bounds memory on huge documents
GROUP = 2**23  # characters tokenised in one parallel call


def hash_text(text: str) -> int:
    """64 bits. Among 10^9 documents, two share theirs by chance with probability 0.03."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", errors="replace"), digest_size=8).digest(), "big"
    )


def normalise(text: str) -> str:
    """Equal for texts that differ in case, white space or the composition of characters alone."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip().casefold()


def is_held_out(text_hash: int, val_fraction: float) -> bool:
    """Whether a document belongs to validation: a document and its exact copies always do alike."""
    return text_hash < int(val_fraction * 2.0**64)


def tokenise(
    texts: Iterable[tuple[str, T]], tokenizer: Tokenizer, group: int | None = None
) -> Iterator[tuple[NDArray[np.int64], T | None]]:
    """Tokens of every (text, tag), piece after piece; with the last piece of a text its tag, else None.

    Texts without a character give nothing. group: characters tokenised in one call.
    """
    pieces = ((piece, tag if last else None) for text, tag in texts for piece, last in _cut(text))
    for some in _group(pieces, group or GROUP):
        encoded = tokenizer.encode_batch([piece for piece, _ in some])
        yield from zip(encoded, (tag for _, tag in some), strict=True)


def _cut(text: str) -> Iterator[tuple[str, bool]]:
    """Pieces of at most PIECE characters, cut at a line's end where there is one; whether it is the last."""
    start = 0
    while start < len(text):
        stop = len(text)
        if stop - start > PIECE:
            stop = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        yield text[start:stop], stop == len(text)
        start = stop


def _group(pieces: Iterable[tuple[str, T]], limit: int) -> Iterator[list[tuple[str, T]]]:
    """Pieces in lists of about `limit` characters."""
    group, size = [], 0
    for piece in pieces:
        group.append(piece)
        size += len(piece[0])
        if size >= limit:
            yield group
            group, size = [], 0
    if group:
        yield group

"""Rows of text for training: sample i is a pure function of (seed, i), whoever asks for it and when.

The stream is a ring of documents, each followed by one end-of-text token. A row is `length` consecutive
tokens of it, and the token after them as the last target. A position starts a document when the token before
it is the end-of-text token; predicting a document's first token has no loss, its context is another document.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from data.store import TokenStream

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]
Batch = dict[str, torch.Tensor]


class PackedDocuments:
    """Independent rows. Every epoch cuts the ring at other places and visits its rows in another order."""

    def __init__(self, stream: TokenStream) -> None:
        self.stream = stream

    def sample(self, length: int, indices: Sequence[int] | Ints, seed: Sequence[int]) -> Batch:
        """Rows `indices` of an endless sequence: ids, targets (n, length) int64, loss_weight fp32, answer and
        document_starts bool.
        """
        return _cut_rows(self.stream, self._firsts(length, indices, seed), length)

    def position(self, length: int, index: int, seed: Sequence[int]) -> dict[str, float]:
        """Where row `index` lies."""
        n_rows = max(1, len(self.stream) // length)
        return {"epoch": index / n_rows, **_document_of(self.stream, self._firsts(length, [index], seed))}

    def _firsts(self, length: int, indices: Sequence[int] | Ints, seed: Sequence[int]) -> Ints:
        """Where rows begin on the ring."""
        n_rows = max(1, len(self.stream) // length)
        epoch, index = np.divmod(np.asarray(indices, np.int64), n_rows)
        key = mix_words(hash_seed(seed) + epoch.astype(np.uint64))
        first = (key % np.uint64(length)).astype(np.int64)
        return first + permute(index, n_rows, key) * length


class ConsecutiveDocuments:
    """Rows that continue each other, for a state carried over batches.

    With b rows a step, row r of step s + 1 continues row r of step s: the rows are b readers that start
    evenly spaced on the ring and go round it for ever.
    """

    def __init__(self, stream: TokenStream, tokens_per_step: int) -> None:
        self.stream, self.tokens_per_step = stream, tokens_per_step

    def sample(self, length: int, indices: Sequence[int] | Ints, seed: Sequence[int]) -> Batch:
        """As `PackedDocuments.sample`; index i is row i % b of step i // b, b = tokens_per_step / length."""
        return _cut_rows(self.stream, self._firsts(length, indices, seed), length)

    def position(self, length: int, index: int, seed: Sequence[int]) -> dict[str, float]:
        """Where row `index` lies. Epochs count what all readers have read together."""
        epoch = index * length / len(self.stream)
        return {"epoch": epoch, **_document_of(self.stream, self._firsts(length, [index], seed))}

    def _firsts(self, length: int, indices: Sequence[int] | Ints, seed: Sequence[int]) -> Ints:
        """Where rows begin on the ring."""
        rows = self.tokens_per_step // length
        step, row = np.divmod(np.asarray(indices, np.int64), rows)
        size = len(self.stream)
        origin = int(hash_seed(seed)[0] % np.uint64(size))
        return (origin + row * size // rows + step * length) % size


def _document_of(stream: TokenStream, firsts: Ints) -> dict[str, float]:
    document, token = stream.locate(int(firsts[0]))
    return {"document": document, "document_token": token}


def _cut_rows(stream: TokenStream, firsts: Ints, length: int) -> Batch:
    """Rows of the ring that begin at positions `firsts` (n,)."""
    positions = firsts[:, None] + np.arange(-1, length + 1)
    # The ring's first token starts a document too: the one before it may be the end of a cut document.
    return cut_rows(stream.take(positions), stream.eos_id, positions[:, 1:] % len(stream) == 0)


def cut_rows(tokens: Ints, eos_id: int, also_starts: NDArray[np.bool_] | bool = False) -> Batch:
    """Rows from their tokens (n, 1 + length + 1): the token before each, its own, and the one behind it.

    also_starts: further tokens, all but the first, that start a document.
    """
    starts = (tokens[:, :-1] == eos_id) | also_starts
    return {
        "ids": torch.from_numpy(tokens[:, 1:-1].copy()),
        "targets": torch.from_numpy(tokens[:, 2:].copy()),
        "loss_weight": torch.from_numpy(np.where(starts[:, 1:], np.float32(0), np.float32(1))),
        "answer": torch.zeros(len(tokens), tokens.shape[1] - 2, dtype=torch.bool),
        "document_starts": torch.from_numpy(starts[:, :-1].copy()),
    }


def hash_seed(seed: Sequence[int]) -> Words:
    """64 random bits from a seed, (1,)."""
    return np.random.SeedSequence(list(seed)).generate_state(1, np.uint64).astype(np.uint64)


def mix_words(x: Words) -> Words:
    """The finalizer of splitmix64: a bijection of 64-bit words that scatters neighbours."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: Ints, size: int, key: Words) -> Ints:
    """Where a random permutation of [0, size) sends `index` (n,); `key` (n,) chooses the permutation.

    A Feistel network permutes the next power of four without a table, so memory does not grow with the
    corpus. Values at or above `size` are sent on until they fall below it.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    value = index.astype(np.uint64)
    outside = np.ones(len(value), bool)
    while outside.any():
        left, right = value[outside] >> half, value[outside] & mask
        for turn in range(4):
            scrambled = mix_words(key[outside] + (right << np.uint64(3)) + np.uint64(turn))
            left, right = right, left ^ (scrambled & mask)
        value[outside] = left << half | right
        outside = value >= np.uint64(size)
    return value.astype(np.int64)

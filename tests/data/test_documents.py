"""Rows of documents against a slow reading of the ring, token by token."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.documents import ConsecutiveDocuments, PackedDocuments, hash_seed, mix_words, permute
from data.store import TokenStream

EOS = 0


class Ring(TokenStream):
    """A stream of the given tokens, without a file."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__(Path(), "uint8", EOS, 0, len(tokens))
        self.__dict__["_tokens"] = np.array(tokens, np.uint8)


def make_ring(lengths: list[int]) -> Ring:
    """Documents of numbered tokens 1, 2, ..., each followed by EOS."""
    return Ring([t for n in lengths for t in [*((np.arange(n) % 250) + 1).tolist(), EOS]])


def counter_ring(size: int) -> Ring:
    """One document whose tokens tell their position (size <= 250)."""
    return Ring([*range(1, size), EOS])


rings = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(make_ring)


def check_row(ring: Ring, batch: dict[str, torch.Tensor], row: int, first: int) -> None:
    tokens, size = ring._tokens.tolist(), len(ring)
    length = batch["ids"].shape[1]
    starts = [p % size == 0 or tokens[(p - 1) % size] == EOS for p in range(first, first + length + 1)]
    assert batch["ids"][row].tolist() == [tokens[p % size] for p in range(first, first + length)]
    assert batch["targets"][row].tolist() == [tokens[p % size] for p in range(first + 1, first + length + 1)]
    assert batch["document_starts"][row].tolist() == starts[:-1]
    assert batch["loss_weight"][row].tolist() == [0.0 if start else 1.0 for start in starts[1:]]


@given(rings, st.integers(1, 50), st.integers(0, 5))
def test_packed_rows_are_cut_from_the_ring(ring: Ring, length: int, seed: int) -> None:
    batch = PackedDocuments(ring).sample(length, range(7), (seed, 0))
    candidates = [PackedDocuments(counter_like(ring)).sample(length, range(7), (seed, 0))["ids"][:, 0]]
    for row, first in enumerate(candidates[0].tolist()):
        check_row(ring, batch, row, first)


def counter_like(ring: Ring) -> Ring:
    """A ring of the same size whose token at position p is p: reads back where rows begin."""
    counter = Ring([0] * len(ring))
    counter.__dict__["_tokens"] = np.arange(len(ring))
    return counter


@given(rings, st.integers(1, 20), st.integers(1, 5), st.integers(0, 5))
def test_consecutive_rows_are_cut_from_the_ring(ring: Ring, length: int, rows: int, seed: int) -> None:
    source = ConsecutiveDocuments(ring, rows * length)
    firsts = ConsecutiveDocuments(counter_like(ring), rows * length).sample(
        length, range(3 * rows), (seed, 0)
    )["ids"]
    batch = source.sample(length, range(3 * rows), (seed, 0))
    for row, first in enumerate(firsts[:, 0].tolist()):
        check_row(ring, batch, row, first)


def test_contract_types() -> None:
    batch = PackedDocuments(make_ring([100])).sample(16, [0, 1], (0, 0))
    types = {name: value.dtype for name, value in batch.items()}
    assert types == {
        "ids": torch.int64,
        "targets": torch.int64,
        "loss_weight": torch.float32,
        "answer": torch.bool,
        "document_starts": torch.bool,
    }
    assert all(value.shape == (2, 16) and value.is_contiguous() for value in batch.values())
    assert not batch["answer"].any()


def test_an_epoch_of_packed_rows_reads_every_token_at_most_once() -> None:
    ring = counter_like(make_ring([1000]))
    source, n_rows = PackedDocuments(ring), 1001 // 16
    orders = []
    for epoch in range(3):
        ids = source.sample(16, range(epoch * n_rows, (epoch + 1) * n_rows), (0, 0))["ids"]
        assert ids.unique().numel() == n_rows * 16
        assert not torch.equal(ids[:, 0].sort().values, ids[:, 0]), "shuffled"
        orders.append(ids[:, 0])
    assert not torch.equal(orders[0], orders[1])
    assert set(orders[0].tolist()) != set(orders[1].tolist()), "cut at other places"


def test_consecutive_rows_continue_and_cover_the_ring() -> None:
    size, rows, length = 960, 4, 24
    source = ConsecutiveDocuments(counter_like(make_ring([size - 1])), rows * length)
    steps = [
        source.sample(length, range(s * rows, (s + 1) * rows), (5, 0)) for s in range(size // (rows * length))
    ]
    for before, after in itertools.pairwise(steps):
        assert torch.equal(before["targets"][:, -1], after["ids"][:, 0])
    assert torch.cat([step["ids"].flatten() for step in steps]).unique().numel() == size


@pytest.mark.parametrize("kind", ["packed", "consecutive"])
def test_a_row_depends_on_seed_and_index_alone(kind: str) -> None:
    ring = counter_like(make_ring([5000]))
    source = PackedDocuments(ring) if kind == "packed" else ConsecutiveDocuments(ring, 8 * 32)
    whole = source.sample(32, range(1000, 1016), (1, 0))
    part = source.sample(32, [1013, 1002], (1, 0))
    assert all(torch.equal(part[k], whole[k][[13, 2]]) for k in whole)
    for other in ((2, 0), (1, 1)):
        assert not torch.equal(source.sample(32, range(1000, 1016), other)["ids"], whole["ids"])


def test_a_corpus_shorter_than_a_row_repeats_with_its_starts() -> None:
    batch = PackedDocuments(make_ring([3])).sample(10, [0], (0, 0))
    check_row(make_ring([3]), batch, 0, batch["ids"][0].tolist().index(1) * -1 % 4)
    assert batch["document_starts"].sum() in (2, 3)


@given(st.integers(1, 3000), st.integers(0, 2**32))
def test_permutations_are_bijections(size: int, seed: int) -> None:
    key = np.repeat(mix_words(hash_seed([seed])), size)
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def test_permutations_look_random() -> None:
    size, keys = 100, 3000
    key = mix_words(hash_seed([0]) + np.arange(keys, dtype=np.uint64))
    places = [permute(np.full(keys, i), size, key) for i in (0, 1, 99)]
    for place in places:
        counts = np.bincount(place // 10, minlength=10)
        assert counts.min() > 230, counts  # 300 expected, standard deviation 16
        assert counts.max() < 370, counts
    correlation = np.corrcoef(np.stack(places))
    assert np.abs(correlation - np.eye(3)).max() < 0.1

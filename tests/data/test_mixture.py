"""A mixture keeps its weights over every prefix, and reads each source's rows once, in order."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.documents import whole_weights
from data.batches import Batch
from data.mixture import Mixture, schedule

weights_strategy = st.lists(st.integers(1, 60), min_size=1, max_size=6)


class Numbers:
    """Row i of a source says i and the seed."""

    def sample(self, length: int, indices: Sequence[int], seed: Sequence[int]) -> Batch:
        rows = torch.as_tensor(np.asarray(indices))[:, None].expand(-1, length)
        return {"ids": rows.clone(), "source": torch.full_like(rows, seed[-1])}

    def position(self, length: int, index: int, seed: Sequence[int]) -> dict[str, float]:
        return {"row": index, "seed": seed[-1]}


@settings(max_examples=60, deadline=None)
@given(weights_strategy)
def test_every_prefix_is_exact_to_within_one_row(weights: list[int]) -> None:
    order = np.tile(schedule(weights), 2)
    counts = np.cumsum(order[:, None] == np.arange(len(weights)), 0)
    shares = np.arange(1, len(order) + 1)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(counts - shares).max() < 1
    assert counts[-1].tolist() == [2 * weight for weight in weights]


@settings(max_examples=40, deadline=None)
@given(weights_strategy, st.integers(0, 10**6))
def test_rows_are_a_function_of_their_index_and_read_each_source_in_order(
    weights: list[int], at: int
) -> None:
    mixture = Mixture([Numbers()] * len(weights), weights)
    which, within = mixture.places(4, np.arange(3 * sum(weights)))
    for k in range(len(weights)):
        assert within[which == k].tolist() == list(range(3 * weights[k]))
    batch = mixture.sample(4, [at + 5, at], (7, 0))
    alone = [mixture.sample(4, [i], (7, 0)) for i in (at + 5, at)]
    assert all(torch.equal(batch[name], torch.cat([row[name] for row in alone])) for name in batch)
    source, row = batch["source"][1, 0].item(), batch["ids"][1, 0].item()
    assert mixture.position(4, at, (7, 0)) == {"source": source, "row": row, "seed": source}


@settings(max_examples=40, deadline=None)
@given(weights_strategy, st.integers(1, 9))
def test_lanes_read_every_source_in_order_at_their_own_place(weights: list[int], lanes: int) -> None:
    mixture = Mixture([Numbers()] * len(weights), weights, lanes * 8)
    steps = 2 * sum(weights)
    which, within = mixture.places(8, np.arange(steps * lanes))
    assert which.tolist() == np.resize(schedule(weights), steps * lanes).tolist()
    for lane in range(lanes):
        for k in range(len(weights)):
            mine = within[lane::lanes][which[lane::lanes] == k]
            assert mine.tolist() == [turn * lanes + lane for turn in range(len(mine))]


@pytest.mark.parametrize(
    ("given_weights", "whole"),
    [([0.7, 0.3], [7, 3]), ([1.0, 2.0, 4.0], [1, 2, 4]), ([0.1, 0.2, 0.0], [1, 2, 0]), ([2.5], [1])],
)
def test_weights_keep_their_exact_ratio(given_weights: list[float], whole: list[int]) -> None:
    assert whole_weights(given_weights) == whole

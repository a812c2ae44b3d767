"""What a step consumes does not depend on ranks, micro-batches or workers."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from data.batches import Batch, BatchLoader, TrainBatches, TrainLoader, ValidationBatches


class Numbered:
    """Samples that hold their own index; the seed is kept for the asking."""

    def position(self, length: int, index: int, seed: Sequence[int]) -> dict[str, float]:
        return {"row": index, "tokens": length}

    def sample(self, length: int, indices: Sequence[int], seed: Sequence[int]) -> Batch:
        ids = torch.tensor(list(indices))[:, None].expand(-1, length).clone()
        return {
            "ids": ids,
            "loss_weight": torch.ones_like(ids, dtype=torch.float32),
            "answer": torch.ones_like(ids, dtype=torch.bool),
            "document_starts": torch.zeros_like(ids, dtype=torch.bool),
            "seed": torch.tensor(list(seed)),
        }


TRAIN = TrainBatches(
    source=Numbered(),
    seed=7,
    length=8,
    batch_size=12,
    max_steps=5,
    accumulate=1,
    curriculum_length=None,
    curriculum_steps=0,
    rank=0,
    world_size=1,
)
VALIDATION = ValidationBatches(source=Numbered(), length=8, sequences=10, micro_batch=4, rank=0, world_size=1)


def step_samples(batches: TrainBatches, step: int) -> list[int]:
    """Samples of a step over all ranks and micro-batches, each once, in order."""
    parts = range(step * batches.accumulate, (step + 1) * batches.accumulate)
    ranks = range(batches.world_size)
    return sorted(i for r in ranks for k in parts for i in replace(batches, rank=r)[k]["ids"][:, 0].tolist())


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_step_consumes_the_same_samples_however_it_is_divided(world_size: int, accumulate: int) -> None:
    batches = replace(TRAIN, batch_size=24, world_size=world_size, accumulate=accumulate)
    assert len(batches) == 5 * accumulate
    for step in range(5):
        assert step_samples(batches, step) == list(range(24 * step, 24 * step + 24))
    assert batches[0]["ids"].shape == (24 // (world_size * accumulate), 8)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 3)])
def test_a_curriculum_keeps_tokens_a_step(world_size: int, accumulate: int) -> None:
    batches = replace(
        TRAIN, curriculum_length=2, curriculum_steps=2, world_size=world_size, accumulate=accumulate
    )
    shapes = [batches[k]["ids"].numel() for k in range(len(batches))]
    assert set(shapes) == {12 * 8 // (world_size * accumulate)}
    assert step_samples(batches, 1) == list(range(48, 96))
    assert step_samples(batches, 2) == list(range(24, 36))
    assert batches[0]["ids"].shape[1] == 2
    assert batches[2 * accumulate]["ids"].shape[1] == 8


def test_no_row_continues_one_of_another_length() -> None:
    batches = replace(TRAIN, curriculum_length=2, curriculum_steps=2, accumulate=2)
    starts = [bool(batches[k]["document_starts"][:, 0].all()) for k in range(10)]
    assert starts == [True, True, False, False, True, True, False, False, False, False]
    assert not any(batches[k]["document_starts"][:, 1:].any() for k in range(10))


def test_validation_shares_no_seed_with_training() -> None:
    assert TRAIN[0]["seed"].tolist() == [7, 0, 8]
    assert VALIDATION[0]["seed"].tolist() == [0, 1, 8]
    assert replace(TRAIN, seed=0)[0]["seed"].tolist() != VALIDATION[0]["seed"].tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("sequences", [1, 7, 10, 16, 17])
def test_validation_counts_every_sample_once_in_equal_shapes(world_size: int, sequences: int) -> None:
    ranks = [
        replace(VALIDATION, sequences=sequences, world_size=world_size, rank=r) for r in range(world_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    counted: list[int] = []
    for k in range(len(ranks[0])):
        batches = [rank[k] for rank in ranks]
        assert len({batch["ids"].shape for batch in batches}) == 1
        for batch in batches:
            rows = batch["loss_weight"][:, 0] > 0
            assert torch.equal(batch["answer"].all(1), rows)
            assert torch.equal(batch["loss_weight"].sum(1) > 0, rows)
            counted += batch["ids"][rows, 0].tolist()
    assert sorted(counted) == list(range(sequences))
    if world_size == 1:
        assert sum(len(ranks[0][k]["ids"]) for k in range(len(ranks[0]))) == sequences, (
            "no idle rows on one rank"
        )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_starts_where_the_optimizer_stands(num_workers: int) -> None:
    done = 3
    batches = replace(TRAIN, accumulate=2)
    loader = TrainLoader(batches, steps_done=lambda: done, content="", num_workers=num_workers)
    assert len(loader) == 10
    seen = [batch["ids"][:, 0].tolist() for batch in loader]
    assert seen == [list(range(i, i + 6)) for i in (36, 42, 48, 54)]
    assert loader.state_dict() == {"samples": 36, "content": ""}


def test_loader_may_be_read_again() -> None:
    loader = BatchLoader(VALIDATION)
    first, second = ([batch["ids"].tolist() for batch in loader] for _ in range(2))
    assert first == second
    assert len(first) == len(loader) == 3


def test_loader_refuses_other_data() -> None:
    loader = TrainLoader(TRAIN, steps_done=lambda: 3, content="abc")
    loader.load_state_dict(loader.state_dict())
    loader.load_state_dict(
        TrainLoader(replace(TRAIN, accumulate=4), steps_done=lambda: 3, content="abc").state_dict()
    )
    other_batch_size = TrainLoader(
        replace(TRAIN, batch_size=24), steps_done=lambda: 3, content="abc"
    ).state_dict()
    with pytest.raises(
        ValueError, match=r"^data\.batch_size=12: .* 3 steps consumed 72 samples; resume with"
    ):
        loader.load_state_dict(other_batch_size)
    with pytest.raises(ValueError, match=r"^data\.documents\.source: .* changed since .*; restore them"):
        loader.load_state_dict({**loader.state_dict(), "content": "abd"})

"""Which samples each micro-batch holds, and loaders that hand them out from any step on."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

Batch = dict[str, torch.Tensor]
T = TypeVar("T")
TRAINING, VALIDATION = 0, 1  # second number of a seed: streams of samples that share nothing


class Source(Protocol):
    """Endless samples: row i is a pure function of (length, indices[i], seed).

    `position` tells where row `index` lies in what there is to read, for the record.
    """

    def sample(self, length: int, indices: Sequence[int], seed: Sequence[int]) -> Batch: ...

    def position(self, length: int, index: int, seed: Sequence[int]) -> dict[str, float]: ...


@dataclass(frozen=True)
class Piece:
    """The tokens of every row that one rank of a context group reads.

    segment: tokens that a rank reads at a time. Each `segment * size` tokens of a row are then shared out
    among the ranks, in order; None: the whole row at once.
    """

    rank: int = 0
    size: int = 1
    segment: int | None = None

    def of(self, batch: Batch) -> Batch:
        """This rank's part of tensors (B, T). Targets and weights were made of the whole rows."""
        if self.size == 1:
            return batch
        return {
            name: torch.cat([t[:, span] for span in self.spans(t.shape[1])], 1) for name, t in batch.items()
        }

    def spans(self, length: int) -> list[slice]:
        shared = self.size * (self.segment or length)
        spans = []
        for start in range(0, length, shared):
            part = min(shared, length - start) // self.size
            spans.append(slice(start + self.rank * part, start + (self.rank + 1) * part))
        return spans


@dataclass(frozen=True, kw_only=True)
class TrainBatches(Dataset[Batch]):
    """The micro-batches of one rank: item k is micro-batch k % accumulate of optimizer step k // accumulate.

    rank, world_size: among the data ranks, which read different rows. piece: of these rows.
    stages_begin_anew: count samples from the step at which their length came: for rows only read in order.

    Step s consumes samples [s * batch_size, (s + 1) * batch_size) of `length` tokens. During the first
    `curriculum_steps` it consumes as many tokens in shorter samples. Ranks and micro-batches take contiguous
    parts of a step's samples, so neither their number nor that of workers changes what a step consumes.
    """

    source: Source
    seed: int
    length: int
    batch_size: int
    max_steps: int
    accumulate: int
    curriculum_length: int | None
    curriculum_steps: int
    rank: int
    world_size: int
    piece: Piece = Piece()
    stages_begin_anew: bool = False

    def __len__(self) -> int:
        return self.max_steps * self.accumulate

    def __getitem__(self, k: int) -> Batch:
        step, part = divmod(k, self.accumulate)
        length, stage_start = self._stage(step)
        rows = self.batch_size * self.length // length
        size = rows // (self.accumulate * self.world_size)
        first = self._counted(step, stage_start) * rows + (part * self.world_size + self.rank) * size
        batch = self.source.sample(length, range(first, first + size), (self.seed, TRAINING, length))
        if "document_starts" in batch and step == stage_start:
            batch["document_starts"][:, 0] = (
                True  # rows of another length came before: nothing continues them
            )
        return self.piece.of(batch)

    def position(self, steps: int) -> dict[str, float]:
        """Where the data stand after so many steps: the first sample of the next, counted at its length, and
        where that lies."""
        length, stage_start = self._stage(steps)
        sample = self._counted(steps, stage_start) * (self.batch_size * self.length // length)
        return {"sample": sample, **self.source.position(length, sample, (self.seed, TRAINING, length))}

    def _counted(self, step: int, stage_start: int) -> int:
        """Steps whose samples come before those of `step`."""
        return step - stage_start if self.stages_begin_anew else step

    def _stage(self, step: int) -> tuple[int, int]:
        """The length of a step's samples, and the first step of that length."""
        if self.curriculum_length is not None and step < self.curriculum_steps:
            return self.curriculum_length, 0
        return self.length, self.curriculum_steps


@dataclass(frozen=True, kw_only=True)
class ValidationBatches(Dataset[Batch]):
    """The validation batches of one rank: `sequences` samples in all, the same whatever seed trains.

    Every rank has as many batches of equal shape. Where the samples do not divide evenly, a rank's surplus
    rows carry no loss weight and no answer: sums over ranks are sums over the samples.
    """

    source: Source
    length: int
    sequences: int
    micro_batch: int
    rank: int
    world_size: int
    piece: Piece = Piece()

    def __len__(self) -> int:
        return -(-self.sequences // (self.micro_batch * self.world_size))

    def __getitem__(self, k: int) -> Batch:
        start = k * self.micro_batch * self.world_size
        size = min(self.micro_batch, -(-(self.sequences - start) // self.world_size))
        first = start + self.rank * size
        batch = self.source.sample(self.length, range(first, first + size), (0, VALIDATION, self.length))
        surplus = max(0, min(size, first + size - self.sequences))
        if surplus:
            batch["loss_weight"][-surplus:] = 0
            batch["answer"][-surplus:] = False
        return self.piece.of(batch)


class BatchLoader:
    """Iterates over `batches` in order, from item `first()` on; `len` counts from item 0.

    A plain iterable, no DataLoader: Lightning would otherwise put its own sampler into it.
    """

    def __init__(
        self,
        batches: TrainBatches | ValidationBatches,
        *,
        first: Callable[[], int] = lambda: 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.batches, self.first = batches, first
        self.num_workers, self.pin_memory = num_workers, pin_memory

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(
            DataLoader(
                self.batches,
                batch_size=None,  # an item is a whole batch
                sampler=range(self.first(), len(self)),
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
            )
        )


def weigh_steps(batches: Iterable[Batch], accumulate: int) -> Iterator[Batch]:
    """Micro-batches with `step_weight`: the loss weight of all those of their optimizer step on this rank.

    A step's micro-batches are fetched together, so that the first already knows what the last weighs.
    """
    for step in batched(batches, accumulate):
        weight = torch.stack([batch["loss_weight"].sum() for batch in step]).sum()
        for batch in step:
            yield {**batch, "step_weight": weight}


def batched(items: Iterable[T], count: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while some := list(islice(iterator, count)):
        yield some


class TrainLoader(BatchLoader):
    """A loader that continues where the optimizer stands, not where an iterator stood.

    `steps_done()` is the number of optimizer steps behind us. It alone decides what comes next: batches that
    workers had fetched ahead, a step cut off between two micro-batches, or another number of ranks or
    micro-batches change nothing. The state that Lightning saves with a checkpoint only guards against data
    that is no longer the same.

    `len` is the whole run's: without it Lightning fetches one batch ahead, and loses it when a run resumes.
    """

    def __init__(
        self, batches: TrainBatches, *, steps_done: Callable[[], int], content: str, **options: Any
    ) -> None:
        super().__init__(batches, first=lambda: steps_done() * batches.accumulate, **options)
        self.steps_done, self.content = steps_done, content
        self.batch_size, self.accumulate = batches.batch_size, batches.accumulate

    def __iter__(self) -> Iterator[Batch]:
        return weigh_steps(super().__iter__(), self.accumulate)

    def state_dict(self) -> dict[str, Any]:
        """samples: the first global sample that no finished step has consumed."""
        return {"samples": self.steps_done() * self.batch_size, "content": self.content}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the samples after the checkpoint are the ones it would have seen.

        Raises:
            ValueError: data.batch_size or the corpus has changed since.
        """
        expected = self.state_dict()
        if state["samples"] != expected["samples"]:
            raise ValueError(
                f"data.batch_size={self.batch_size}: the checkpoint's {self.steps_done()} steps consumed "
                f"{state['samples']} samples; resume with the batch size it was written with"
            )
        if state["content"] != expected["content"]:
            raise ValueError(
                "data.documents.source: documents or tokenizer changed since the checkpoint was written; "
                "restore them, or start in another run_dir"
            )

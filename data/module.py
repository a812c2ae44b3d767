"""The data of one training run, as Lightning takes it."""

from typing import Any

import lightning.pytorch as pl

from conf.schema import TrainConfig, require
from conf.tasks import IN_TEXT
from data.batches import BatchLoader, Piece, Source, TrainBatches, TrainLoader, ValidationBatches
from data.opened import Documents
from data.store import Stream
from data.tasks.registry import build_source
from data.tokenizers import Tokenizer, load_tokenizer


class TokenDataModule(pl.LightningDataModule):
    """Training and validation batches of `config.data`.

    Training micro-batches resume exactly from any checkpoint, also with another number of ranks, of
    micro-batches per step or of workers. Validation always reads the same samples at train_length.

    Attributes:
        tokenizer: of the task or the documents.

    Raises:
        ValueError: on construction, when tokenizer, task or source do not fit the config; on `prepare_data`,
            when the documents cannot be read.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Tokenizer = load_tokenizer(config.data.tokenizer)
        require(
            self.tokenizer.vocab_size <= config.model.vocab_size,
            "model.vocab_size",
            config.model.vocab_size,
            f"data.tokenizer={config.data.tokenizer} needs at least {self.tokenizer.vocab_size}",
        )
        self._documents: Documents | None = None
        self._prepared = False
        self._train: Source | None = None
        self._validation: Source | None = None
        if config.data.name in ("documents", *IN_TEXT):
            self._documents = Documents(config.data, self.tokenizer)
        else:
            self._train = self._validation = self._task()

    def prepare_data(self) -> None:
        """Tokenise the documents, once for all runs that read them. Called in one process per node."""
        if self._documents is not None:
            for line in self._documents.prepare():
                if not self._prepared and (self.trainer is None or self.trainer.is_global_zero):
                    print(line, flush=True)
            self._prepared = True

    def setup(self, stage: str) -> None:
        """Open the documents in every process."""
        documents = self._documents
        if documents is None:
            return
        if self.config.data.name == "documents":
            self._train, self._validation = documents.train(), documents.validation()
        else:
            self._train, self._validation = map(self._task, documents.texts())

    def train_dataloader(self) -> TrainLoader:
        assert self.trainer is not None
        assert self._train is not None
        trainer, data = self.trainer, self.config.data
        batches = TrainBatches(
            source=self._train,
            seed=self.config.seed,
            length=data.train_length,
            batch_size=data.batch_size,
            max_steps=self.config.trainer.max_steps,
            accumulate=self.config.trainer.accumulate,
            curriculum_length=data.curriculum_length,
            curriculum_steps=data.curriculum_steps,
            stages_begin_anew=self._documents is not None and data.documents.streaming,
            **self._share(trainer.global_rank),
        )
        _align_batch_progress(trainer, batches)
        return TrainLoader(
            batches,
            steps_done=lambda: trainer.global_step,
            content="" if self._documents is None else self._documents.content,
            num_workers=data.num_workers,
            pin_memory=_uses_cuda(trainer),
        )

    def val_dataloader(self) -> BatchLoader:
        assert self.trainer is not None
        assert self._validation is not None
        trainer, data = self.trainer, self.config.data
        batches = ValidationBatches(
            source=self._validation,
            length=data.train_length,
            sequences=data.val_sequences,
            micro_batch=data.batch_size // (self.config.trainer.data_ranks * self.config.trainer.accumulate),
            **self._share(trainer.global_rank),
        )
        return BatchLoader(batches, pin_memory=_uses_cuda(trainer))  # no workers: starting them costs more

    def _task(self, text: Stream | None = None) -> Source:
        return build_source(self.config.data, self.tokenizer, text)

    def _share(self, global_rank: int) -> dict[str, Any]:
        """What of a step's rows a rank reads. Ranks of a context group follow each other."""
        settings = self.config.trainer
        rank, place = divmod(global_rank, settings.context_parallel)
        piece = Piece(place, settings.context_parallel, settings.segment_length)
        return {"rank": rank, "world_size": settings.data_ranks, "piece": piece}


def _uses_cuda(trainer: pl.Trainer) -> bool:
    return trainer.strategy.root_device.type == "cuda"


def _align_batch_progress(trainer: pl.Trainer, batches: TrainBatches) -> None:
    """Put a restarting trainer's count of micro-batches where `batches` will continue: at a step's beginning.

    Lightning restores the count of the run that wrote the checkpoint. When that run had another number of
    micro-batches a step, or was cut off between two of them, Lightning would step after the wrong ones.
    """
    if not trainer.fit_loop.restarting:
        return
    progress = trainer.fit_loop.epoch_loop.batch_progress
    count = trainer.global_step * batches.accumulate
    counters: list[Any] = [progress.total, progress.current]  # the same: the whole run is one epoch
    for counter in counters:
        # A checkpoint written in on_train_batch_end has not counted its batch as completed; Lightning will.
        pending = counter.processed - counter.completed
        counter.ready = counter.started = counter.processed = count
        counter.completed = count - pending
    progress.is_last_batch = count == len(batches)

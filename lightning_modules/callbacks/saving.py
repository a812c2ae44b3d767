"""Checkpoints from which a run continues as if nothing had happened."""

import os
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from conf.load import from_dict, to_dict
from conf.schema import TrainConfig
from lightning_modules.callbacks.highest import highest
from lightning_modules.checkpoints import (
    checkpoint_path,
    keep_stable,
    link_last,
    list_checkpoints,
    prune,
    read_checkpoint,
    write_checkpoint,
)
from lightning_modules.finite import first_non_finite_parameter
from lightning_modules.optim import full_shape
from lightning_modules.run_dir import RunError
from lightning_modules.schedule import stable_steps
from lightning_modules.termination import Termination
from lightning_modules.verdict import await_verdict, is_judged


class SaveCheckpoints(Checkpoint):
    """Saves every `trainer.checkpoint_every` steps, at the last step, and when the process is asked to end,
    be it by a signal or by a pruner.

    Always at the end of an optimizer step, after the validation that is due there: a resumed run neither
    repeats nor skips one. A signal that arrives meanwhile waits until then.
    """

    def __init__(
        self, config: TrainConfig, folder: Path, termination: Termination, mlflow_run_id: str | None
    ) -> None:
        self.config, self.folder, self.termination = config, folder, termination
        self.mlflow_run_id = mlflow_run_id
        self.pruned = False  # the worker's pruner has ended the run at this step
        self._step = 0  # last step whose end was seen; at first that of the checkpoint
        self._rng_to_restore: dict[str, Any] | None = None
        self._unsettled: Path | None = None  # checkpoint that is perhaps still being written

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        first, last = -highest(trainer, -self._step), highest(trainer, self._step)
        if first != last:  # each rank has looked for the newest checkpoint by itself
            raise RunError(
                f"its ranks would go on from steps {first} to {last}: their nodes do not see the same files "
                f"in {self.folder}; put run_dir where they do"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._require_space(trainer)
        self._step = trainer.global_step
        self.termination.deferred = True
        self.termination.install()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not earlier: making data iterators draws random numbers.
        if self._rng_to_restore is not None:
            set_rng_state(self._rng_to_restore)
            self._rng_to_restore = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # between two micro-batches
        self._step = trainer.global_step
        if self._step % self.config.trainer.val_every != 0:
            self._end_step(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.pruned = self._is_to_be_pruned(trainer)
            self._end_step(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.termination.deferred = False

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.termination.deferred = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = to_dict(self.config)
        checkpoint["step"] = trainer.global_step
        checkpoint["rng"] = get_rng_state()
        checkpoint["mlflow_run_id"] = self.mlflow_run_id

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._step = checkpoint["step"]
        self._rng_to_restore = checkpoint["rng"]

    def _end_step(self, trainer: pl.Trainer) -> None:
        settings, signum = self.config.trainer, self._asked_to_end(trainer)
        stable = settings.keep_stable and self._step == stable_steps(self.config.optim, settings.max_steps)
        ends = signum or self.pruned or self._step == settings.max_steps
        if ends or stable or self._step % settings.checkpoint_every == 0:
            self._save(trainer)
        if ends or stable or not settings.async_checkpoints:
            self._settle(trainer)
        if stable and trainer.is_global_zero:
            keep_stable(self.folder, checkpoint_path(self.folder, self._step))
        if signum:
            self.termination.end(signum)
        trainer.should_stop = self.pruned

    def _is_to_be_pruned(self, trainer: pl.Trainer) -> bool:
        """Rank 0 asks, all learn the answer. The last step is never pruned: the run is complete."""
        if not is_judged() or self._step == self.config.trainer.max_steps:
            return False
        return bool(trainer.strategy.broadcast(trainer.is_global_zero and await_verdict(self._step)))

    def _asked_to_end(self, trainer: pl.Trainer) -> int | None:
        """The signal that any rank received: all of them save together."""
        return highest(trainer, self.termination.signum or 0) or None

    def _save(self, trainer: pl.Trainer) -> None:
        assert trainer.lightning_module is not None
        where = first_non_finite_parameter(trainer.lightning_module)
        if where is not None:
            raise RunError(f"after step {self._step}: first not finite: {where}; nothing saved")
        self._settle(trainer)
        self._require_space(trainer)
        path = checkpoint_path(self.folder, self._step)
        with self._saying_what_is_left(path):
            trainer.save_checkpoint(path, weights_only=False)
        self._unsettled = path

    def _settle(self, trainer: pl.Trainer) -> None:
        """Wait until the last checkpoint is written whole, then let go of older ones."""
        if self._unsettled is None:
            return
        path, self._unsettled = self._unsettled, None
        if trainer.is_global_zero:
            with self._saying_what_is_left(path):
                assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)
                trainer.strategy.checkpoint_io.wait()
                link_last(self.folder, path)
                prune(self.folder, self.config.trainer.keep_last)

    @contextmanager
    def _saying_what_is_left(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = next(iter(list_checkpoints(self.folder)), None)
            raise RunError(
                f"{path}: cannot be written ({error.strerror or error}); last good one: {kept}"
            ) from None

    def _require_space(self, trainer: pl.Trainer) -> None:
        """Raise RunError, on all ranks, if the disk has no room for one more checkpoint.

        That is the parameters and AdamW's two moments, and what the last one held beside them.
        """
        assert trainer.lightning_module is not None
        missing = 0
        if trainer.is_global_zero:
            needed = 3 * sum(4 * full_shape(p).numel() for p in trainer.lightning_module.parameters())
            last = next(iter(list_checkpoints(self.folder)), None)
            needed = max(needed, 0 if last is None else last.stat().st_size)
            missing = max(0, needed - shutil.disk_usage(self.folder).free)
        missing = highest(trainer, missing)
        if missing:
            kept = next(iter(list_checkpoints(self.folder)), None)
            raise RunError(
                f"{self.folder}: the disk lacks {missing / 2**20:,.1f} MiB for a checkpoint: free some and "
                f"give the same command again; last good one: {kept}"
            )


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's access to checkpoint files: written at once, read once and as data only.

    in_background: `save_checkpoint` copies the contents to CPU memory and returns; `wait` tells the outcome.
    """

    in_background = False

    def __init__(self, loaded: tuple[Path, dict[str, Any]] | None = None) -> None:
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self.path = None if loaded is None else loaded[0]
        self._contents = {} if loaded is None else loaded[1]

    @property
    def step(self) -> int:
        """Where the checkpoint that was read stands; 0 without one."""
        return self._contents.get("step", 0)

    def config(self) -> TrainConfig:
        """The config in the checkpoint that was read."""
        return from_dict(TrainConfig, self._contents["config"])

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if not self.in_background:
            write_checkpoint(checkpoint, path)
            return
        self.wait()
        self._writing = self._writer.submit(write_checkpoint, copy_to_cpu(checkpoint), path)

    def wait(self) -> None:
        """Until the file is there. Raises OSError if it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if str(path) == str(self.path) and self._contents:
            contents = self._contents
            self._contents = {}  # do not hold it for the whole run: it is as large as model and optimizer
            return contents
        return read_checkpoint(path, map_location)

    def remove_checkpoint(self, path: Any) -> None:
        os.unlink(path)


def copy_to_cpu(contents: Any) -> Any:
    """Nested contents that training no longer changes; tensors that share memory share it in the copy."""
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() == 0 or key not in copies:
            copies[key] = tensor.detach().to("cpu", copy=True)
        return copies[key]

    return apply_to_collection(contents, Tensor, copy)


def get_rng_state() -> dict[str, Any]:
    """Python's, NumPy's and PyTorch's random state as plain data."""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "python": [version, list(internal), gauss],
        "numpy": {
            **numpy_state,
            "state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()},
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = state["numpy"]
    key = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])

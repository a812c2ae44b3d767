"""What a run reports every few steps: loss, gradients, speed, memory, place in the data; every validation."""

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn

from conf.schema import TrainConfig
from lightning_modules.callbacks.highest import highest
from lightning_modules.language_model import LanguageModel
from lightning_modules.memory import peak_bytes
from lightning_modules.planning.peaks import model_flops_utilisation, peak_flops
from lightning_modules.schedule import lr_factor
from lightning_modules.tracking import Tracker


class TrackerLogger(Logger):
    """Lets `self.log` of a LightningModule reach the tracker. Lightning counts such steps from 0."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self.tracker = tracker

    @property
    def name(self) -> str:
        return self.tracker.config.experiment

    @property
    def version(self) -> str | None:
        return self.tracker.run_id

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.tracker.log_metrics(metrics, step or 0)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The tracker holds the whole config from the start."""


class LogMetrics(pl.Callback):
    """Logs at the number of finished optimizer steps; its state outlives restarts."""

    def __init__(self, config: TrainConfig, tracker: Tracker) -> None:
        self.config, self.tracker = config, tracker
        self.tokens_per_step = config.data.batch_size * config.data.train_length
        self.started = False
        self.seconds = 0.0  # of training without validation, over all restarts
        self.tokens_per_second = 0.0  # over the last logged interval
        self.last: dict[str, float] = {}  # the last logged training metrics
        self.val_step = 0
        self.val_metrics: dict[str, float] = {}
        self._mark = time.monotonic()
        self._step = self._logged_step = 0
        self._logged_seconds = 0.0
        self.peak_flops: float | None = None  # of one device; None: unknown

    def state_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "last": self.last,
            "val_step": self.val_step,
            "val_metrics": self.val_metrics,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.last = state_dict["seconds"], state_dict["last"]
        self.val_step, self.val_metrics = state_dict["val_step"], state_dict["val_metrics"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = True
        self._step = self._logged_step = trainer.global_step
        self._logged_seconds = self.seconds
        self.peak_flops = peak_flops(self.config, trainer.strategy.root_device)
        self._mark = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step:
            return  # between two micro-batches
        self._step = step
        self._count_time()
        if self.config.trainer.logs_at(step):
            self._log_training(trainer, step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._count_time()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        self.val_step, self.val_metrics = trainer.global_step, dict(pl_module.val_metrics)
        self.tracker.log_metrics(self.val_metrics, self.val_step)
        self._mark = time.monotonic()

    def _count_time(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._mark
        self._mark = now

    def _log_training(self, trainer: pl.Trainer, step: int) -> None:
        module, optim = trainer.lightning_module, self.config.optim
        assert isinstance(module, LanguageModel)
        steps, seconds = step - self._logged_step, self.seconds - self._logged_seconds
        self._logged_step, self._logged_seconds = step, self.seconds
        self.tokens_per_second = steps * self.tokens_per_step / seconds
        self.last = {
            "train/loss": module.train_loss,
            "train/grad_norm": module.grad_norm,
            "train/lr": optim.lr * lr_factor(step - 1, optim, self.config.trainer.max_steps),
            "train/tokens": float(step * self.tokens_per_step),
        }
        measured = {
            "train/tokens_per_second": self.tokens_per_second,
            # of the rank that has held most
            "train/peak_memory_mib": highest(trainer, peak_bytes(trainer.strategy.root_device)) / 2**20,
            **self.utilisation("train/mfu", self.tokens_per_second),
        }
        if not self.tracker.active:
            return
        gradients = {f"grad_norm/{group}": norm for group, norm in module.grad_norms.items()}
        place: dict[str, float] = trainer.train_dataloader.batches.position(step)  # type: ignore[union-attr]
        data = {f"data/{name}": value for name, value in place.items()}
        self.tracker.log_metrics({**self.last, **gradients, **data, **measured}, step)

    def utilisation(self, name: str, tokens_per_second: float) -> dict[str, float]:
        """The share of all devices' peak that the model's FLOPs take, where that peak is known."""
        if self.peak_flops is None:
            return {}
        return {name: model_flops_utilisation(self.config, tokens_per_second, self.peak_flops)}

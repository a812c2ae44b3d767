"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from conf.schema import TrainConfig
from lightning_modules.callbacks.metrics import LogMetrics

LINES_EVERY = 10  # logged points between two lines


class Progress(pl.Callback):
    """Loss, learning rate and tokens/s; the metrics of each validation on a line of their own."""

    def __init__(self, config: TrainConfig, metrics: LogMetrics) -> None:
        self.config, self.metrics = config, metrics
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        if self.config.trainer.progress_bar and sys.stdout.isatty() and trainer.is_global_zero:
            self._bar = RichProgress(
                BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
            )
            self._task = self._bar.add_task("", total=self.config.trainer.max_steps, completed=self._step)
            self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step:
            return  # between two micro-batches
        self._step = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=self._describe())
        elif trainer.is_global_zero and step % (self.config.trainer.log_every * LINES_EVERY) == 0:
            print(f"step {step}/{self.config.trainer.max_steps}  {self._describe()}", flush=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        values = "  ".join(f"{name} {value:.4f}" for name, value in self.metrics.val_metrics.items())
        line = f"step {trainer.global_step}/{self.config.trainer.max_steps}  {values}"
        if self._bar is not None and trainer.state.fn == TrainerFn.FITTING:
            self._bar.console.print(line, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _describe(self) -> str:
        last = self.metrics.last
        if "train/loss" not in last:
            return ""
        return (
            f"loss {last['train/loss']:.4f}  lr {last['train/lr']:.2e}  "
            f"tokens/s {self.metrics.tokens_per_second:,.0f}"
        )

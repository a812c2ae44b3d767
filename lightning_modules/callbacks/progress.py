"""How far a run is, in tokens: a bar on a terminal, a line now and then elsewhere."""

import time
from collections import deque
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from conf.schema import TrainConfig
from lightning_modules.callbacks.metrics import LogMetrics

LINES_EVERY = 10  # logged points between two lines
RECENT = 200  # micro-batches by whose pace the time left is told, validations between them included


class Progress(pl.Callback):
    """Tokens, time left, loss, learning rate and tokens/s; each validation's metrics on a line of their own.

    Tokens are those of the whole run: all ranks, all starts. A step's micro-batches count as they are done,
    since one of a million tokens takes its time.
    """

    def __init__(self, config: TrainConfig, metrics: LogMetrics, console: Console | None = None) -> None:
        self.config, self.metrics = config, metrics
        self.console = console or Console()
        self.total = config.trainer.max_steps * metrics.tokens_per_step
        self.tokens = 0
        self._lines_every = config.trainer.log_every * LINES_EVERY
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        self._step = self._parts = 0  # finished steps, and micro-batches of the next
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step, self._parts = trainer.global_step, 0
        self._count()
        if self.config.trainer.progress_bar and self.console.is_terminal and trainer.is_global_zero:
            # The tokens first: a narrow terminal cuts the end off.
            self._bar = RichProgress(BarColumn(20), TextColumn("{task.description}"), console=self.console)
            self._task = self._bar.add_task(self.describe(), total=self.total, completed=self.tokens)
            self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step != self._step
        self._step, self._parts = trainer.global_step, 0 if stepped else self._parts + 1
        self._count()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.tokens, description=self.describe())
        elif trainer.is_global_zero and stepped and self._step % self._lines_every == 0:
            print(f"{self._where()}  {self.describe()}", flush=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        values = "  ".join(f"{name} {value:.4f}" for name, value in self.metrics.val_metrics.items())
        self._step = trainer.global_step
        line = f"{self._where()}  {values}"
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

    def describe(self) -> str:
        """`1.5M/12M tokens  36,012 tokens/s  0:04:51 left  loss 2.1034  lr 1.20e-03`, as far as known."""
        parts = [f"{short(self.tokens)}/{short(self.total)} tokens"]
        if self.metrics.tokens_per_second:
            parts.append(f"{self.metrics.tokens_per_second:,.0f} tokens/s")
        left = self.seconds_left()
        if left is not None:
            parts.append(f"{timedelta(seconds=round(left))} left")
        last = self.metrics.last
        if "train/loss" in last:
            parts.append(f"loss {last['train/loss']:.4f}  lr {last['train/lr']:.2e}")
        return "  ".join(parts)

    def seconds_left(self) -> float | None:
        """By the pace of late, whatever it was spent on; None before this start has a pace."""
        (began, first), (now, tokens) = self._recent[0], self._recent[-1]
        return None if tokens == first else (self.total - tokens) * (now - began) / (tokens - first)

    def _where(self) -> str:
        return f"step {self._step}/{self.config.trainer.max_steps}"

    def _count(self) -> None:
        part = self.metrics.tokens_per_step // self.config.trainer.accumulate
        self.tokens = self._step * self.metrics.tokens_per_step + self._parts * part
        self._recent.append((time.monotonic(), self.tokens))

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def short(count: int) -> str:
    """Three digits: 999, 12.3K, 1.05M, 300B."""
    value, unit = float(count), ""
    for larger in "KMBT":
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f}{unit}" if value >= 99.5 or not unit else f"{value:.3g}{unit}"

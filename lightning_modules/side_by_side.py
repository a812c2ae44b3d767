"""Several small runs trained side by side in one process, each a run directory like any other.

On a GPU a tiny model leaves the device idle while Python launches its kernels. Here each run's optimizer step
is one CUDA graph on a stream of its own: a launch a step, and the steps of different runs overlap. On the CPU
the runs take turns, step by step, through the code that Lightning calls: weights equal those of
`lightning_modules.train` bit for bit (tests/lightning_modules/test_side_by_side.py).

A stopped run leaves side_by_side.ckpt in its run directory and goes on from there side by side with any other
runs; `lightning_modules.train` does not read it and would begin that run again.
"""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from conf.load import flatten, from_dict, to_dict
from conf.schema import TrainConfig, require
from data.batches import TrainBatches, ValidationBatches, weigh_steps
from data.passkey import PasskeyTask
from data.tokenizers import load_tokenizer
from lightning_modules.callbacks.metrics import LogMetrics
from lightning_modules.captured_step import CapturedStep
from lightning_modules.checkpoints import (
    checkpoint_path,
    link_last,
    read_checkpoint,
    write_checkpoint,
)
from lightning_modules.finite import first_non_finite_parameter
from lightning_modules.fit import final_metrics, prepare_process, start_from
from lightning_modules.initial_state import Rows
from lightning_modules.language_model import LanguageModel
from lightning_modules.optim import build_optimizer
from lightning_modules.run_dir import RunDir, RunError, config_hash, require_same_settings
from lightning_modules.schedule import lr_factor
from lightning_modules.termination import Terminated, Termination
from lightning_modules.tracking import Tracker

UNFINISHED = "side_by_side.ckpt"


def require_side_by_side(config: TrainConfig) -> None:
    """Refuse what only `lightning_modules.train` can do, in one line."""
    trainer, name = config.trainer, "side_by_side"
    require(trainer.devices * trainer.num_nodes == 1, name, "...", "needs trainer.devices=1, num_nodes=1")
    require(trainer.precision == "32-true", name, "...", "needs trainer.precision=32-true")
    require(trainer.segment_length is None, name, "...", "reads whole rows: leave trainer.segment_length out")
    require(config.data.name == "passkey", name, "...", "trains passkey prompts: data.name=passkey")
    alone = config.continue_from is None and not trainer.keep_stable
    require(alone, name, "...", "neither continues another run nor is continued: train lengths alone")
    require(not trainer.cuda_graphs, name, "...", "makes graphs of its own: leave trainer.cuda_graphs out")
    require(config.probe.factor == 0, name, "...", "has no probe: leave probe.factor at 0")


def train_side_by_side(runs: Sequence[RunDir]) -> dict[Path, str]:
    """Train all to their ends; returns run directory -> what is wrong, for those that failed.

    Raises Terminated after a signal, with every unfinished run saved.
    """
    prepare_process(runs[0].config)
    lanes, failed = [], {}
    with Termination() as termination:
        for run in runs:
            lanes.append(Lane(run))
        termination.deferred = True
        open_lanes = list(lanes)
        while open_lanes:
            for lane in list(open_lanes):
                try:
                    with lane.guarded():
                        lane.advance()
                        if lane.is_done:
                            lane.finish()
                except RunError as error:
                    failed[lane.run.path] = str(error)
                if lane.is_closed:
                    open_lanes.remove(lane)
            if termination.signum:
                for lane in open_lanes:
                    lane.save_unfinished()
                    lane.close("KILLED")
                raise Terminated(termination.signum)
    return failed


class Standalone(LanguageModel):
    """A LanguageModel outside Lightning's loop: what it logs for callbacks has no reader."""

    def log_dict(self, *arguments: Any, **settings: Any) -> None:
        pass


class Lane:
    """One run: its model, its place in its data, its records."""

    def __init__(self, run: RunDir) -> None:
        self.run, self.config = run, run.config
        require_side_by_side(self.config)
        cuda = self.config.trainer.accelerator != "cpu" and torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu")
        self.stream = torch.cuda.Stream() if cuda else None
        self.began, self.is_closed = time.monotonic(), False
        self.module = Standalone(self.config)
        self.trainer = _trainer(self.config, self.module, self.device)
        self.module.trainer = self.trainer
        self.module.configure_model()
        saved = self._read_unfinished()
        if saved is None and self.config.init_from is not None:
            start_from(self.config.init_from, self.module)
        self.module.to(self.device)
        self.optimizer = build_optimizer(self.module.model, self.config.optim)
        self.captured: dict[tuple[int, ...], CapturedStep] = {}
        tags = {
            "seed": str(self.config.seed),
            "config_hash": config_hash(self.config),
            "side_by_side": "true",
        }
        self.tracker = Tracker(
            self.config.tracking, run.path, name=run.name, params=flatten(self.config), tags=tags
        )
        self.tracker.__enter__()
        self.tracker.log_artifact(run.path / "config.yaml")
        self.metrics = LogMetrics(self.config, self.tracker)
        if saved is not None:
            self._restore(saved)
        self.first_step = self.step
        self._batches, self._validation = _data(self.config)
        self.trainer.train_dataloader = SimpleNamespace(batches=self._batches)
        if cuda:
            torch.cuda.synchronize()  # weights were made on another stream than the run's own
        self.metrics.on_train_start(self.trainer, self.module)

    @property
    def step(self) -> int:
        return self.trainer.global_step

    @property
    def is_done(self) -> bool:
        return self.step == self.config.trainer.max_steps

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Anything that ends this run closes its records as failed; the others go on."""
        stream = torch.cuda.stream(self.stream) if self.stream is not None else nullcontext()
        try:
            with stream:
                yield
        except RunError:
            self.close("FAILED")
            raise
        except BaseException:
            self.close("FAILED")
            raise

    def advance(self) -> None:
        """One optimizer step, and the validation that is due after it."""
        settings, optim = self.config.trainer, self.config.optim
        self._set_lr(optim.lr * lr_factor(self.step, optim, settings.max_steps))
        batches = [
            {name: value.to(self.device, non_blocking=True) for name, value in self._batches[k].items()}
            for k in range(self.step * settings.accumulate, (self.step + 1) * settings.accumulate)
        ]
        if self.stream is not None and settings.accumulate == 1:
            self._step_captured(batches[0])
        else:
            self._step(batches)
        self.trainer.global_step += 1
        self.metrics.on_train_batch_end(self.trainer, self.module, None, None, 0)
        if self.step % settings.val_every == 0 or self.is_done:
            self._validate()

    def finish(self) -> None:
        """Write the checkpoint and the result, as `lightning_modules.train` leaves them."""
        where = first_non_finite_parameter(self.module)
        if where is not None:
            raise RunError(f"after step {self.step}: first not finite: {where}; nothing saved")
        path = checkpoint_path(self.run.checkpoints, self.step)
        write_checkpoint(self._contents(), path)
        link_last(self.run.checkpoints, path)
        result = {
            "status": "completed",
            "command": "train",
            "metrics": final_metrics(self.step, self.metrics, self.device),
            "mlflow_run_id": self.tracker.run_id,
            "tracking_complete": False,
            "checkpoint": str(path.relative_to(self.run.path)),
            "steps": self.step,
            "continued_from": None,
            "first_step_this_start": self.first_step,
            "seconds": self.metrics.seconds,
            "seconds_this_start": time.monotonic() - self.began,
        }
        self.run.write_result(result)
        self.tracker.log_artifact(self.run.path / "result.json")
        self.close("FINISHED")
        self.run.write_result({**result, "tracking_complete": self.tracker.complete})
        (self.run.path / UNFINISHED).unlink(missing_ok=True)

    def save_unfinished(self) -> None:
        write_checkpoint(self._contents(), self.run.path / UNFINISHED)

    def close(self, status: str) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.tracker.close(status)
            self.run.close()

    def _step(self, batches: list[dict[str, Tensor]]) -> None:
        """What Lightning does for one optimizer step, in its order."""
        self.optimizer.zero_grad()
        for batch in weigh_steps(batches, len(batches)):
            (self.module.training_step(batch, 0) / len(batches)).backward()
        self.module.on_before_optimizer_step(self.optimizer)
        self.module.configure_gradient_clipping(self.optimizer, self.config.optim.grad_clip or None)
        self.optimizer.step()

    def _step_captured(self, batch: dict[str, Tensor]) -> None:
        """The same as one graph; losses are looked at where they are logged."""
        rows = Rows(self.step, 0, 0, len(batch["ids"]))
        state = self.module.initial_state.begin(self.module.model, batch, rows)
        key = (*batch["ids"].shape, 0 if state is None else 1)
        if key not in self.captured:
            self.captured[key] = CapturedStep(self.module, self.optimizer, batch, state)
        captured = self.captured[key]
        final = captured.replay(batch, state)
        self.module.initial_state.end(batch, rows, final)
        self.module.initial_state.end_step(self.trainer)
        settings = self.config.trainer
        if (self.step + 1) % settings.log_every == 0 or self.step + 1 == settings.max_steps:
            self.module.train_loss, self.module.grad_norm = captured.loss.item(), captured.norm.item()
            for name, value in (
                ("train loss", self.module.train_loss),
                ("gradient norm", self.module.grad_norm),
            ):
                if not math.isfinite(value):
                    raise RunError(f"after step {self.step}: {name} is {value}")

    def _validate(self) -> None:
        self.metrics.on_validation_start(self.trainer, self.module)
        self.module.eval()
        with torch.no_grad():
            self.module.on_validation_epoch_start()
            for k in range(len(self._validation)):
                batch = {name: value.to(self.device) for name, value in self._validation[k].items()}
                self.module.validation_step(batch, k)
            self.module.on_validation_epoch_end()
        self.module.train()
        self.metrics.on_validation_end(self.trainer, self.module)

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _contents(self) -> dict[str, Any]:
        return {
            "state_dict": self.module.state_dict(),
            "optimizer_states": [self.optimizer.state_dict()],
            "initial_state": self.module.initial_state.state_dict(self.trainer) if self.step else {},
            "metrics": self.metrics.state_dict(),
            "config": to_dict(self.config),
            "step": self.step,
            "mlflow_run_id": self.tracker.run_id,
        }

    def _read_unfinished(self) -> dict[str, Any] | None:
        path = self.run.path / UNFINISHED
        if not path.exists():
            return None
        saved = read_checkpoint(path)
        require_same_settings(path, from_dict(TrainConfig, saved["config"]), self.config)
        return saved

    def _restore(self, saved: dict[str, Any]) -> None:
        self.module.load_state_dict(saved["state_dict"])
        self.optimizer.load_state_dict(saved["optimizer_states"][0])
        if saved["initial_state"]:
            self.module.initial_state.load_state_dict(saved["initial_state"], self.trainer)
        self.metrics.load_state_dict(saved["metrics"])
        self.trainer.global_step = saved["step"]
        print(f"{self.run.path}: continuing from step {saved['step']}", flush=True)


def _trainer(config: TrainConfig, module: pl.LightningModule, device: torch.device) -> Any:
    """What a LanguageModel and its callbacks ask of their trainer, on one device."""
    return SimpleNamespace(
        accumulate_grad_batches=config.trainer.accumulate,
        global_step=0,
        global_rank=0,
        is_global_zero=True,
        lightning_module=module,
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
        state=SimpleNamespace(fn=TrainerFn.FITTING),
        strategy=SimpleNamespace(reduce=lambda value, reduce_op: value, root_device=device),
        world_size=1,
    )


def _data(config: TrainConfig) -> tuple[TrainBatches, ValidationBatches]:
    """The batches of `data.module.TokenDataModule`, without its loaders."""
    data, trainer = config.data, config.trainer
    task = PasskeyTask(load_tokenizer(data.tokenizer), data.passkey)
    train = TrainBatches(
        source=task,
        seed=config.seed,
        length=data.train_length,
        batch_size=data.batch_size,
        max_steps=trainer.max_steps,
        accumulate=trainer.accumulate,
        curriculum_length=data.curriculum_length,
        curriculum_steps=data.curriculum_steps,
        rank=0,
        world_size=1,
    )
    validation = ValidationBatches(
        source=task,
        length=data.train_length,
        sequences=data.val_sequences,
        micro_batch=data.batch_size // trainer.accumulate,
        rank=0,
        world_size=1,
    )
    return train, validation


def report(failed: dict[Path, str]) -> None:
    for path, why in failed.items():
        print(f"error: {path}: {why}", file=sys.stderr, flush=True)

"""One training run, from an open run directory to its result."""

import logging
import os
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

from conf.load import flatten
from conf.schema import TrainConfig
from data.module import TokenDataModule
from lightning_modules.calibration.file import read_calibration
from lightning_modules.callbacks.metrics import LogMetrics, TrackerLogger
from lightning_modules.callbacks.probe import OverLengthProbe
from lightning_modules.callbacks.progress import Progress
from lightning_modules.callbacks.saving import AtomicCheckpointIO, SaveCheckpoints
from lightning_modules.callbacks.summary import PrintSummary
from lightning_modules.checkpoints import (
    checkpoint_path,
    find_newest,
    load_weights,
    read_checkpoint,
    read_weights,
)
from lightning_modules.cpu import has_native_bf16, settle_memory
from lightning_modules.language_model import LanguageModel
from lightning_modules.memory import out_of_memory, peak_memory_mib
from lightning_modules.metrics_file import MetricsFile, copy_points
from lightning_modules.planning.estimate import tokens_at_once
from lightning_modules.ranks import lost_rank
from lightning_modules.run_dir import RunDir, config_hash, is_rank_zero, require_same_settings
from lightning_modules.schedule import stable_steps
from lightning_modules.slurm import is_rank
from lightning_modules.strategies.zero import ZeroStrategy, build_strategy
from lightning_modules.termination import Termination
from lightning_modules.tracking import Tracker

# Lightning's notices that say nothing about this run; the rest, and all warnings, come through.
LIGHTNING_CHATTER = (
    "GPU available",
    "TPU available",
    "HPU available",
    "Using bfloat16",
    "Using 16bit",
    "Restoring states",
    "Restored all states",
    "Loaded model weights",
    "`Trainer.fit` stopped",
    "💡 Tip",
)


def fit(run: RunDir) -> dict[str, Any]:
    """Train to `trainer.max_steps`, from the newest checkpoint if there is one, and validate at the end.
    Ends before where a pruner says so (lightning_modules.verdict).

    Returns what result.json holds. Raises ValueError (one line) before the first step for what the user can
    mend, RunError for a run that failed, Terminated after a signal; MLflow reads FAILED or KILLED then.
    """
    config, began = run.config, time.monotonic()
    prepare_process(config)
    checkpoint_io = AtomicCheckpointIO(find_newest(run.checkpoints))
    if checkpoint_io.path is not None:
        require_same_settings(checkpoint_io.path, checkpoint_io.config(), config)
        print(f"continuing from {checkpoint_io.path}", flush=True)
    elif config.continue_from is not None:
        checkpoint_io = continue_from(run, Path(config.continue_from))
    checkpoint_io.in_background = config.trainer.async_checkpoints
    on_cpu = config.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    strategy = build_strategy(config, on_cpu)
    module = LanguageModel(config)
    if config.init_from is not None and checkpoint_io.path is None:
        start_from(config.init_from, module)
    first_step = checkpoint_io.step
    tags = {
        "seed": str(config.seed),
        "config_hash": config_hash(config),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    tracker = Tracker(config.tracking, run.path, name=run.name, params=flatten(config), tags=tags)
    with Termination() as termination, tracker:
        if config.continue_from is not None:
            tracker.set_tags({"continues": config.continue_from})
        tracker.log_artifact(run.path / "config.yaml")
        metrics = LogMetrics(config, tracker)
        saving = SaveCheckpoints(config, run.checkpoints, termination, tracker.run_id)
        probes = [OverLengthProbe(config)] if config.probe.factor else []
        callbacks = [*probes, metrics, Progress(config, metrics), PrintSummary(), saving]
        trainer = build_trainer(run, tracker, callbacks, checkpoint_io, strategy, on_cpu)
        try:
            data = TokenDataModule(config)
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint_io.path, weights_only=True)
            if metrics.val_step != trainer.global_step:
                trainer.validate(module, datamodule=data, verbose=False)
        except ValueError as error:
            if metrics.started:  # not the user's mistake: show where it comes from
                raise RuntimeError(f"after step {trainer.global_step}: {error}") from error
            raise
        except (RuntimeError, MemoryError) as error:
            step = trainer.global_step
            lack = out_of_memory(error, step, graphed=module.eager_because is None)
            raise lack or lost_rank(error, step) or error from None
        steps = trainer.global_step
        if saving.pruned:
            tracker.set_tags({"pruned": "true"})
            tracker.final_status = "KILLED"
        result = {
            "status": "pruned" if saving.pruned else "completed",
            "command": "train",
            "metrics": final_metrics(steps, metrics, trainer.strategy.root_device),
            "mlflow_run_id": tracker.run_id,
            "tracking_complete": False,
            "checkpoint": str(checkpoint_path(run.checkpoints, steps).relative_to(run.path)),
            "steps": steps,
            "continued_from": config.continue_from,
            "first_step_this_start": first_step,
            "seconds": metrics.seconds,
            "seconds_this_start": time.monotonic() - began,
        }
        if trainer.is_global_zero:
            run.write_result(result)
            tracker.log_artifact(run.path / "result.json")
    result["tracking_complete"] = tracker.complete
    if trainer.is_global_zero:
        run.write_result(result)
    return result


def prepare_process(config: TrainConfig) -> None:
    """Threads, seeds, and silence about what concerns no one."""
    settle_memory(tokens_at_once(config), config.trainer.segment_length is not None)
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    # Deterministic algorithms would also fill every new tensor with NaN first: slow, and nothing reads those.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    pl.seed_everything(config.seed, workers=True, verbose=False)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_not_chatter)
    # srun is there on every login node; whether it started us, `launcher` knows.
    warnings.filterwarnings("ignore", message="The `srun` command is available on your system")
    # Lightning 2.6 calls a PyTorch function by its old name, on every batch.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")


def continue_from(run: RunDir, path: Path) -> AtomicCheckpointIO:
    """Begin at another run's stable checkpoint, its metrics up to there included.

    Raises ValueError (one line) unless this run would have passed through the very same state.
    """
    config, contents = run.config, read_checkpoint(path)
    checkpoint_io = AtomicCheckpointIO((path, contents))
    theirs = checkpoint_io.config()
    require_same_settings(path, theirs, config, besides="trainer.max_steps")
    step = contents["step"]
    common = min(stable_steps(c.optim, c.trainer.max_steps) for c in (theirs, config))
    if step > common:
        raise ValueError(
            f"continue_from={path}: stands at step {step}, but learning rates of trainer.max_steps="
            f"{theirs.trainer.max_steps} and {config.trainer.max_steps} agree to step {common} alone: "
            "train from the start"
        )
    if is_rank_zero():
        earlier = MetricsFile(path.parents[1] / "metrics.jsonl").points
        copy_points([point for point in earlier if point.step <= step], run.path / "metrics.jsonl")
    print(f"continuing {path} from step {step}", flush=True)
    return checkpoint_io


def start_from(path: str, module: LanguageModel) -> None:
    """Give `module` the weights of the model at `path`.

    Raises ValueError (one line) if they do not fit, or the mitigation's calibration belongs to other weights.
    """
    module.configure_model()
    try:
        load_weights(module.model, read_weights(path), path)
    except ValueError as error:
        raise ValueError(f"init_from={error}") from None
    rule = module.config.mitigation
    if rule.calibration is not None:
        read_calibration(rule.calibration, rule.name).require_weights(Path(rule.calibration), module.model)
    print(f"starting from the weights of {path}", flush=True)


def build_trainer(
    run: RunDir,
    tracker: Tracker,
    callbacks: list[pl.Callback],
    checkpoint_io: AtomicCheckpointIO,
    strategy: str | ZeroStrategy,
    on_cpu: bool,
) -> pl.Trainer:
    settings, optim = run.config.trainer, run.config.optim
    if on_cpu and settings.precision.startswith("bf16") and not has_native_bf16():
        print(
            f"warning: trainer.precision={settings.precision} is emulated on this CPU, which has no "
            "AVX512_BF16 or AMX: about 15 times slower than trainer.precision=32-true",
            file=sys.stderr,
            flush=True,
        )
    return pl.Trainer(
        accelerator="cpu" if on_cpu else "cuda",
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=strategy,
        precision=settings.precision if isinstance(strategy, str) else None,
        max_steps=settings.max_steps,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=optim.grad_clip or None,
        val_check_interval=settings.val_every * settings.accumulate,  # counted in micro-batches
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=settings.log_every,
        use_distributed_sampler=False,  # data/batches.py shares samples among ranks
        deterministic=on_cpu,
        logger=TrackerLogger(tracker),
        callbacks=callbacks,
        plugins=[checkpoint_io, *launcher()],
        default_root_dir=run.path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def launcher() -> list[LightningEnvironment | SLURMEnvironment]:
    """How the other ranks come to be, within a SLURM job; elsewhere Lightning finds out by itself.

    Lightning would take any process of such a job for a rank that srun started, and wait for the others; and
    it would requeue the job itself, from inside its signal handler.
    """
    if is_rank():
        return [SLURMEnvironment(auto_requeue=False)]
    return [LightningEnvironment()] if "SLURM_JOB_ID" in os.environ and "RANK" not in os.environ else []


def final_metrics(steps: int, metrics: LogMetrics, device: torch.device) -> dict[str, float]:
    """The last validation and training metrics; tokens, speed over all restarts, and peak memory in MiB."""
    tokens = steps * metrics.tokens_per_step
    return {
        **metrics.last,
        **metrics.val_metrics,
        "tokens": float(tokens),
        "tokens_per_second": tokens / metrics.seconds,
        **metrics.utilisation("mfu", tokens / metrics.seconds),
        "peak_memory_mib": peak_memory_mib(device),
    }


def _is_not_chatter(record: logging.LogRecord) -> bool:
    return not record.getMessage().lstrip().startswith(LIGHTNING_CHATTER)

"""One evaluation from config to result: load, lay out, measure, judge, write, record."""

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from conf.load import flatten, to_dict, to_yaml
from conf.schema import EvaluateConfig, TrainConfig, changed_settings
from data.tokenizers import load_tokenizer
from lightning_modules.checkpoints import WEIGHTS, list_checkpoints, load_config, load_model
from lightning_modules.evaluation.conclusion import conclude, exact_by_length, metrics
from lightning_modules.evaluation.report import accuracy_table, draw_figures, print_summary
from lightning_modules.evaluation.streaming import Reader
from lightning_modules.evaluation.suites import LossSuite, PasskeySuite, plan_loss, plan_passkey
from lightning_modules.figures import save
from lightning_modules.mitigations import build_mitigation
from lightning_modules.run_dir import read_result, write_json, write_text
from lightning_modules.tracking import Tracker

# Settings that leave the measurements as they are, rounding aside.
FREE_SETTINGS = ("run_dir", "print_config", "tracking.", "segment", "device", "threads")


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Carry out one evaluation; returns the contents of result.json.

    A run_dir that holds this very evaluation of this very checkpoint answers with its result at once.

    Raises:
        ValueError: the checkpoint, a length, the device, the tracking store or run_dir cannot be used.
    """
    started = time.monotonic()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = _choose_device(config.device)
    trained = load_config(config.checkpoint)
    model = load_model(config.checkpoint, device=device)
    passkey_suite, loss_suite = _plan(config, trained)
    run_dir = _open_run_dir(config)
    identity = _identity(config)
    result = read_result(run_dir)
    if result is not None:
        if result.get("identity") != identity:
            raise ValueError(f"run_dir={run_dir}: holds another evaluation: choose another run_dir")
        print(f"{run_dir}: holds this evaluation already")
        return result

    _write(run_dir / "config.yaml", to_yaml(replace(config, run_dir=None)))
    with Tracker(
        config.tracking,
        run_dir,
        name=_run_name(config, run_dir),
        params=_params(config, trained),
        tags=_tags(config),
    ) as tracker:
        total = sum(suite.tokens for suite in (passkey_suite, loss_suite) if suite is not None)
        with _progress(total) as on_tokens:
            reader = Reader(model, build_mitigation(config.mitigation), config.segment, on_tokens)
            passkey = passkey_suite.run(reader) if passkey_suite is not None else None
            loss = loss_suite.run(reader) if loss_suite is not None else None
        _warn_of_non_finite(config, passkey, loss)

        train_length = trained.data.train_length
        conclusion = conclude(train_length, passkey, loss)
        evaluation = {
            "checkpoint": config.checkpoint,
            "train_length": train_length,
            "recent_window": passkey_suite.window if passkey_suite is not None else None,
            "model": to_dict(model.config) | {"parameters": sum(p.numel() for p in model.parameters())},
            "mitigation": to_dict(config.mitigation),
            "passkey": passkey,
            "loss": loss,
            "conclusion": conclusion,
        }
        _write(run_dir / "evaluation.json", _to_json(evaluation))
        figures = [save(figure, run_dir / "figures" / name) for name, figure in draw_figures(evaluation)]
        numbers = metrics(train_length, passkey, conclusion) | {
            "speed/tokens_per_second": reader.tokens_per_second,
            "memory/peak_mib": peak_memory_mib(device),
        }
        _record(tracker, numbers, evaluation, figures)
        result = {
            "status": "completed",
            "command": "evaluate",
            "metrics": numbers,
            "mlflow_run_id": tracker.run_id,
            "seconds": time.monotonic() - started,
            "checkpoint": config.checkpoint,
            "identity": identity,
        }
        write_json(run_dir / "result.json", result)
    print_summary(evaluation, numbers, run_dir, figures)
    return result


def peak_memory_mib(device: torch.device) -> float:
    """Most memory that this process (or its share of the GPU) has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent held before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: no CUDA device is visible here; use device=cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _plan(config: EvaluateConfig, trained: TrainConfig) -> tuple[PasskeySuite | None, LossSuite | None]:
    """Everything that will be read, laid out before the run is opened: a mistake leaves nothing behind."""
    tokenizer = load_tokenizer(trained.data.tokenizer)
    if tokenizer.vocab_size > trained.model.vocab_size:
        raise ValueError(
            f"checkpoint={config.checkpoint}: its model has {trained.model.vocab_size} token ids, its "
            f"tokenizer {trained.data.tokenizer} {tokenizer.vocab_size}: restore the one it was trained with"
        )
    return (
        plan_passkey(config, trained.data, tokenizer) if "passkey" in config.suites else None,
        plan_loss(config, trained.data, tokenizer) if "loss" in config.suites else None,
    )


def _open_run_dir(config: EvaluateConfig) -> Path:
    """Create the run directory; without a setting, a new one under runs/ named after checkpoint and time."""
    if config.run_dir is not None:
        path = Path(config.run_dir)
        if (path / "checkpoints").exists() or (path / "lock").exists():
            raise ValueError(f"run_dir={path}: belongs to a training run: choose another run_dir")
        _make_directory(path, exist_ok=True)
        return path
    source = Path(config.checkpoint).resolve()
    source = source.parents[1] if source.parent.name == "checkpoints" else source.with_suffix("")
    mitigation = "" if config.mitigation.name == "none" else f"-{config.mitigation.name}"
    name = f"evaluate-{source.name}{mitigation}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        path = Path("runs") / (name + suffix)
        if not path.exists():
            _make_directory(path, exist_ok=False)
            return path
    raise ValueError(f"run_dir: runs/{name} is taken a thousand times; give run_dir=DIR")


def _make_directory(path: Path, exist_ok: bool) -> None:
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        raise _unwritable(path, error) from None


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise _unwritable(path.parent, error) from None


def _unwritable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"run_dir={path}: cannot be written ({error.strerror or error}): choose another")


def _identity(config: EvaluateConfig) -> str:
    """Hash of the settings that decide the measurements and of the checkpoint's files."""
    settings = {name: value for name, value in flatten(config).items() if not name.startswith(FREE_SETTINGS)}
    path = Path(config.checkpoint)
    files = [*list_checkpoints(path / "checkpoints"), path / WEIGHTS] if path.is_dir() else [path]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return hashlib.sha256(json.dumps([settings, stats], sort_keys=True).encode()).hexdigest()[:16]


def _run_name(config: EvaluateConfig, run_dir: Path) -> str:
    """The run directory's name, behind its parent's where that is the checkpoint's run."""
    inside = run_dir.resolve().parent == Path(config.checkpoint).resolve()
    return f"{run_dir.resolve().parent.name}-{run_dir.name}" if inside else run_dir.name


def _params(config: EvaluateConfig, trained: TrainConfig) -> dict[str, Any]:
    """Of MLflow: how it was measured, and the shape and task of what was measured."""
    skipped = ("run_dir", "print_config", "tracking.")
    kept = ("model.", "data.name", "data.train_length", "data.tokenizer")
    measured = {name: value for name, value in flatten(config).items() if not name.startswith(skipped)}
    model = {name: value for name, value in flatten(trained).items() if name.startswith(kept)}
    return measured | model | {"train.seed": trained.seed}


def _tags(config: EvaluateConfig) -> dict[str, str]:
    return {"command": "evaluate", "checkpoint": config.checkpoint, "mitigation": config.mitigation.name}


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar with tokens/s on a terminal, nothing elsewhere; yields what to call with every tokens read."""
    console = Console(stderr=True)
    columns = (
        TextColumn("evaluating"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, speed="")

        def advance(tokens: int) -> None:
            speed = progress.tasks[0].speed
            progress.update(task, advance=tokens, speed=f"{speed:,.0f} tokens/s" if speed else "")

        yield advance


def _warn_of_non_finite(
    config: EvaluateConfig, passkey: dict[str, Any] | None, loss: dict[str, Any] | None
) -> None:
    """One line for every length at which the model put out NaN or infinity."""
    lengths = set()
    if passkey is not None:
        rows = [*passkey["recent"], *passkey["recall_by_length"]]
        lengths |= {f"passkey prompts of {row['length']} tokens" for row in rows if row["non_finite"]}
    if loss is not None and loss["non_finite"]:
        first = next(p for p, value in zip(loss["position"], loss["loss"], strict=True) if value is None)
        lengths.add(f"the loss near token {first:.0f}")
    settings = {"name": config.mitigation.name, **changed_settings(to_dict(config.mitigation))}
    for what in sorted(lengths):
        print(f"warning: NaN or infinity in {what}, mitigation {settings}: counted as wrong", file=sys.stderr)


def _record(
    tracker: Tracker, numbers: dict[str, float], evaluation: dict[str, Any], figures: list[Path]
) -> None:
    """Everything into MLflow. Accuracy is there twice: by name, and as a curve whose step is the length."""
    tracker.log_metrics(numbers, step=0)
    passkey, conclusion = evaluation["passkey"], evaluation["conclusion"]
    if passkey is not None:
        for name, key in (("recent", "recent"), ("recall", "recall_by_length")):
            for length, exact in exact_by_length(passkey[key]).items():
                tracker.log_metrics({f"passkey/{name}_exact": exact}, step=length)
        tracker.log_table(accuracy_table(passkey), "accuracy_by_length.json")
    for path in figures:
        tracker.log_artifact(path, "figures")
    for name in ("config.yaml", "evaluation.json"):
        tracker.log_artifact(tracker.run_dir / name)
    tracker.set_tags({name: conclusion[name] for name in ("solved", "collapse", "forgetting", "loss_rises")})


def _to_json(value: Any) -> str:
    return json.dumps(_without_infinity(value), indent=2, allow_nan=False) + "\n"


def _without_infinity(value: Any) -> Any:
    """JSON has no infinity: the config's open limits become what YAML writes."""
    if isinstance(value, dict):
        return {key: _without_infinity(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(child) for child in value]
    if isinstance(value, float) and math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    return value

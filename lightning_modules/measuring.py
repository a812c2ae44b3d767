"""What the commands that measure a checkpoint share: device, run directory, progress, identity."""

import errno
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from conf.calibrate_schema import CalibrateConfig
from conf.load import flatten, from_dict
from conf.measure_schema import MeasureConfig
from conf.schema import DataConfig, TrainConfig
from data.tokenizers import Tokenizer, load_tokenizer
from lightning_modules.checkpoints import find_config, list_checkpoints, read_model
from lightning_modules.conversion.tokenizer_files import has_tokenizer
from lightning_modules.guests.load import guest_config, is_guest
from lightning_modules.run_dir import write_text

# Settings that leave the measurements as they are, rounding aside.
FREE_SETTINGS = ("run_dir", "print_config", "tracking.", "segment", "device", "threads")


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: no CUDA device is visible here; use device=cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def trained_config(config: MeasureConfig | CalibrateConfig) -> TrainConfig:
    """How the checkpoint was trained: what it says itself, else what the setting `data` says.

    Raises ValueError (one line) where it is needed and missing, or given and not needed.
    """
    checkpoint = Path(config.checkpoint)
    own = find_config(checkpoint)
    if own is not None:
        if config.data:
            raise ValueError(
                f"data={config.data}: {checkpoint} says itself how it was trained: leave these settings out"
            )
        return own
    settings = {"name": "documents", **config.data}
    if "tokenizer" not in settings and has_tokenizer(checkpoint):
        settings["tokenizer"] = str(checkpoint)
    for name, example in (("train_length", "2048"), ("tokenizer", "EleutherAI/gpt-neox-20b")):
        if name not in settings:
            raise ValueError(
                f"checkpoint={checkpoint}: holds no training config: say what it was trained with, e.g. "
                f"data.{name}={example}"
            )
    if not is_guest(checkpoint):
        return from_dict(TrainConfig, {"model": read_model(checkpoint)[0], "data": settings})
    shape = guest_config(checkpoint)
    if config.mitigation.name != "none":
        raise ValueError(
            f"mitigation.name={config.mitigation.name}: acts in our own scan, and {checkpoint} is a "
            f"{shape.family}: measure it without"
        )
    return TrainConfig(model=shape, data=from_dict(DataConfig, settings))


def tokenizer_of(config: MeasureConfig | CalibrateConfig, trained: TrainConfig) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises ValueError if its model has too few token ids for it."""
    tokenizer = load_tokenizer(trained.data.tokenizer)
    if tokenizer.vocab_size > trained.model.vocab_size:
        raise ValueError(
            f"checkpoint={config.checkpoint}: its model has {trained.model.vocab_size} token ids, its "
            f"tokenizer {trained.data.tokenizer} {tokenizer.vocab_size}: restore the one it was trained with"
        )
    return tokenizer


def open_measuring_dir(config: MeasureConfig, command: str) -> Path:
    """Create the run directory; without a setting, a new one under runs/ named after checkpoint and time."""
    if config.run_dir is not None:
        path = Path(config.run_dir)
        if (path / "checkpoints").exists() or (path / "lock").exists():
            raise ValueError(f"run_dir={path}: belongs to a training run: choose another run_dir")
        _make_directory(path, exist_ok=True)
        return path
    mitigation = "" if config.mitigation.name == "none" else f"-{config.mitigation.name}"
    name = f"{command}-{source_name(config)}{mitigation}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        path = Path("runs") / (name + suffix)
        if not path.exists():
            _make_directory(path, exist_ok=False)
            return path
    raise ValueError(f"run_dir: runs/{name} is taken a thousand times; give run_dir=DIR")


def source_name(config: MeasureConfig) -> str:
    """Of the training run that a checkpoint is from, or of its file."""
    source = Path(config.checkpoint).resolve()
    return source.parents[1].name if source.parent.name == "checkpoints" else source.with_suffix("").name


def require_writable(name: str, path: str | Path) -> None:
    """Refuse a file `name`=`path` that could not be written, before the work whose numbers it is to hold."""
    place = Path(path).resolve()
    try:
        if place.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if place.exists():
            with place.open("ab"):
                pass
        with tempfile.TemporaryFile(dir=place.parent):  # permissions alone do not tell of a read-only disk
            pass
    except OSError as error:
        why = error.strerror or error
        raise ValueError(
            f"{name}={path}: cannot be written ({why}): name a file in a folder that exists"
        ) from None


def write_output(path: Path, text: str) -> None:
    """Write a file of the run directory. Raises ValueError (one line) if it cannot be written."""
    try:
        write_text(path, text)
    except OSError as error:
        raise _unwritable(path.parent, error) from None


def identity(config: MeasureConfig) -> str:
    """Hash of the settings that decide the measurements and of the checkpoint's files."""
    settings = {name: value for name, value in flatten(config).items() if not name.startswith(FREE_SETTINGS)}
    if not config.data:
        del settings["data"]
    if config.mitigation.calibration is not None:  # what it says counts, not where it lies
        contents = Path(config.mitigation.calibration).read_bytes()
        settings["mitigation.calibration"] = hashlib.sha256(contents).hexdigest()
    path = Path(config.checkpoint)
    weights = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    files = [*list_checkpoints(path / "checkpoints"), *weights] if path.is_dir() else [path]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return hashlib.sha256(json.dumps([settings, stats], sort_keys=True).encode()).hexdigest()[:16]


def run_name(config: MeasureConfig, run_dir: Path) -> str:
    """The run directory's name, behind its parent's where that is the checkpoint's run."""
    inside = run_dir.resolve().parent == Path(config.checkpoint).resolve()
    return f"{run_dir.resolve().parent.name}-{run_dir.name}" if inside else run_dir.name


def params(config: MeasureConfig, trained: TrainConfig) -> dict[str, Any]:
    """Of MLflow: how it was measured, and the shape and task of what was measured."""
    skipped = ("run_dir", "print_config", "tracking.")
    kept = ("model.", "data.name", "data.train_length", "data.tokenizer")
    measured = {name: value for name, value in flatten(config).items() if not name.startswith(skipped)}
    if not config.data:
        del measured["data"]
    model = {name: value for name, value in flatten(trained).items() if name.startswith(kept)}
    return measured | model | {"train.seed": trained.seed}


@contextmanager
def show_progress(doing: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with tokens/s on a terminal, nothing elsewhere; yields what to call with every tokens read."""
    console = Console(stderr=True)
    columns = (
        TextColumn(doing),
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


def to_json(value: Any) -> str:
    return json.dumps(_without_infinity(value), indent=2, allow_nan=False) + "\n"


def _make_directory(path: Path, exist_ok: bool) -> None:
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"run_dir={path}: cannot be written ({error.strerror or error}): choose another")


def _without_infinity(value: Any) -> Any:
    """JSON has no infinity: the config's open limits become what YAML writes."""
    if isinstance(value, dict):
        return {key: _without_infinity(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(child) for child in value]
    if isinstance(value, float) and math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    return value

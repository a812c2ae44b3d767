"""Files that hold a model or a whole training state, written at once or not at all, read as data only.

A training checkpoint (.ckpt) is Lightning's dictionary plus `config`, `rng`, `step` and `mlflow_run_id`:
plain dicts, lists, scalars and tensors. Whatever is read here is read with `weights_only=True`: no code runs.

    load_model(path)      path: a run directory, a .ckpt, a directory written by save_model, or a published
                          Mamba-2 (Hugging Face or state-spaces layout)
    save_model(model, path)
    load_config(path)     the training config that made it
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from safetensors.torch import save_file as save_safetensors
from torch import Tensor

from conf.load import from_dict, to_dict, to_yaml
from conf.schema import ModelConfig, TrainConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.conversion.published import is_published, read_published
from lightning_modules.run_dir import write_text

WEIGHTS = "model.safetensors"
TIED = "lm_head.weight"  # shares the embedding's memory under tie_embeddings
STABLE = "stable.ckpt"
PREFIX = "model."  # where LanguageModel holds the Mamba2LM


def load_model(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Mamba2LM:
    """The model at `path`, in evaluation mode; of a run directory, the newest checkpoint that can be read.

    Raises ValueError (one line) for a missing, damaged or foreign file.
    """
    path = Path(path)
    config, weights = read_model(path)
    # Initial values are drawn and overwritten: leave the caller's random numbers alone.
    with torch.random.fork_rng(devices=[]):
        model = Mamba2LM(from_dict(ModelConfig, config))
    load_weights(model, weights, path)
    return model.to(device=device, dtype=dtype).eval()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The parameters of the model at `path` (as for load_model), for `load_weights`.

    Raises ValueError (one line) for a missing, damaged or foreign file.
    """
    return read_model(Path(path))[1]


def save_model(model: Mamba2LM, path: str | Path, config: TrainConfig | None = None) -> None:
    """Write a directory: model.safetensors, and config.yaml with the training config where it is known."""
    weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_embeddings:
        del weights[TIED]
    save_weights(weights, model.config, path, config)


def save_weights(
    weights: dict[str, Tensor], model: ModelConfig, path: str | Path, config: TrainConfig | None = None
) -> None:
    """`save_model` from the parameters alone, a tied head left out; their dtypes are kept."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    temporary = path / f".{WEIGHTS}.tmp"
    save_safetensors(weights, temporary)
    os.replace(temporary, path / WEIGHTS)
    text = to_yaml(config) if config is not None else OmegaConf.to_yaml({"model": to_dict(model)})
    write_text(path / "config.yaml", text)


def load_config(path: str | Path) -> TrainConfig:
    """The training config of the model at `path` (as for load_model).

    Raises ValueError (one line) where `path` cannot be read, or holds a model saved without one.
    """
    config = find_config(path)
    if config is None:
        raise ValueError(f"{path}: saved without its training config: use save_model(model, path, config)")
    return config


def find_config(path: str | Path) -> TrainConfig | None:
    """`load_config`, or None of a model published or saved without one."""
    path = Path(path)
    if is_published(path):
        return None
    if (path / WEIGHTS).is_file():
        saved = _saved_config(path)
        return from_dict(TrainConfig, saved) if "data" in saved else None
    return from_dict(TrainConfig, _load_checkpoint(path)["config"])


def model_weights(contents: dict[str, Any]) -> dict[str, Tensor]:
    """The Mamba2LM's parameters inside a training checkpoint."""
    state = contents["state_dict"]
    return {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}


def load_weights(model: Mamba2LM, weights: dict[str, Tensor], source: str | Path) -> None:
    """Copy `weights` into `model`, or raise ValueError naming the first parameter that does not fit."""
    own = model.state_dict()
    if model.config.tie_embeddings:
        weights = {TIED: weights.get("backbone.embedding.weight", own[TIED]), **weights}
    for name, value in own.items():
        if name not in weights:
            raise ValueError(f"{source}: has no parameter {name}: it belongs to another model")
        if weights[name].shape != value.shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(weights[name].shape)}, the config asks for "
                f"{tuple(value.shape)}: use the config it was trained with"
            )
    for name in weights:
        if name not in own:
            raise ValueError(f"{source}: holds {name}, which the config's model does not have")
    model.load_state_dict(weights)


def write_checkpoint(contents: dict[str, Any], path: str | Path) -> None:
    """Write a .ckpt: a process killed here leaves the previous file, never half a file. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:
        # PyTorch's archive writer hides what the disk said.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a .ckpt as data only. Raises ValueError (one line) if it is missing, damaged or not ours."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        contents = torch.load(path, map_location=map_location, weights_only=True)
    # Damage shows as almost any error: a bad archive, an unpickling error, a short read, a missing record.
    except Exception as error:
        reason = str(error).split("\n")[0][:120]
        raise ValueError(
            f"{path}: truncated or damaged ({type(error).__name__}: {reason}): use another checkpoint"
        ) from None
    if not isinstance(contents, dict) or not {"state_dict", "config", "step"} <= contents.keys():
        raise ValueError(f"{path}: not a checkpoint of this project (no state_dict, config and step)")
    return contents


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step={step:07d}.ckpt"


def list_checkpoints(folder: Path) -> list[Path]:
    """The training checkpoints in `folder`, newest first."""
    return sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]), reverse=True)


def find_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read, with its contents; None where there are none at all.

    Prints one line for each damaged one that it passes over. Raises ValueError if all are damaged.
    """
    paths = list_checkpoints(folder)
    for path in paths:
        try:
            return path, read_checkpoint(path)
        except ValueError as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr)
    if paths:
        raise ValueError(
            f"{folder}: none of its {len(paths)} checkpoints can be read: delete it to start again"
        )
    return None


def link_last(folder: Path, target: Path) -> None:
    """Point last.ckpt at `target` in the same folder, at once."""
    temporary = folder / ".last.ckpt.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, folder / "last.ckpt")


def keep_stable(folder: Path, path: Path) -> None:
    """Keep the checkpoint from which longer runs go on as stable.ckpt, whatever `prune` deletes."""
    temporary = folder / f".{STABLE}.tmp"
    temporary.unlink(missing_ok=True)
    os.link(path, temporary)
    os.replace(temporary, folder / STABLE)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints."""
    for path in list_checkpoints(folder)[keep:]:
        path.unlink(missing_ok=True)


def keep_loaded(path: str | Path) -> None:
    """Keep the model of the training checkpoint at `path` in memory, for this process and those it forks.

    The one kept before is forgotten. What cannot be read is left to whoever needs it.
    """
    path = Path(path)
    paths = list_checkpoints(path / "checkpoints") if path.is_dir() else [path]
    if not paths or (path / WEIGHTS).is_file() or _kept_of(paths[0]) is not None:
        return
    _KEPT.clear()
    with contextlib.suppress(ValueError):
        stamp, contents = _stamp(paths[0]), read_checkpoint(paths[0])
        weights = {PREFIX + name: value for name, value in model_weights(contents).items()}
        _KEPT[stamp] = {**{name: contents[name] for name in ("config", "step")}, "state_dict": weights}


# The model that a process that forks evaluations keeps: at most one, by its file as it was when it was read.
_KEPT: dict[tuple[Any, ...], dict[str, Any]] = {}


def _kept_of(file: Path) -> dict[str, Any] | None:
    return _KEPT.get(_stamp(file)) if _KEPT else None


def _stamp(file: Path) -> tuple[Any, ...]:
    if not file.is_file():
        return (str(file),)
    stat = file.stat()
    return (str(file.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns)


def read_model(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and parameters, in the dtypes they were saved in, of the model at `path` (as for load_model)."""
    if is_published(path):
        parameters = read_published(path)
        return to_dict(parameters.config), parameters.weights
    if (path / WEIGHTS).is_file():
        return _saved_config(path).get("model", {}), _read_weights(path / WEIGHTS)
    contents = _load_checkpoint(path)
    return contents["config"]["model"], model_weights(contents)


def _load_checkpoint(path: Path) -> dict[str, Any]:
    """The training checkpoint at `path`, a .ckpt or a run directory."""
    if not path.is_dir():
        return _kept_of(path) or read_checkpoint(path)
    if paths := list_checkpoints(path / "checkpoints"):
        kept = _kept_of(paths[0])
        if kept is not None:
            return kept
    newest = find_newest(path / "checkpoints")
    if newest is None:
        raise ValueError(f"{path}: holds neither checkpoints/step=*.ckpt nor {WEIGHTS}: train it first")
    return newest[1]


def _saved_config(path: Path) -> dict[str, Any]:
    file = path / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{path}: has {WEIGHTS} but no config.yaml: it was not written by save_model")
    return OmegaConf.to_container(OmegaConf.load(file))  # type: ignore[return-value]


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        return load_safetensors(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: truncated or damaged ({error}): use another copy") from None

"""Our own layouts: a run directory, a .ckpt, a directory by save_model, and consolidated DeepSpeed weights.

DeepSpeed's `zero_to_fp32.py` leaves weights alone, under the names of whatever wrapped the model. Their
config is the nearest config.yaml: beside them or in one of the two directories above, where a run keeps it.
"""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from conf.load import from_dict
from conf.schema import ModelConfig, TrainConfig
from lightning_modules import checkpoints
from lightning_modules.conversion.parameters import Parameters, checked
from lightning_modules.conversion.weight_files import (
    Weights,
    has_weights,
    read_contents,
    read_weights_of,
)

WRAPPERS = ("_forward_module.", "module.", "model.")  # Lightning's, DeepSpeed's, LanguageModel's
RAW = ("*_model_states.pt", "*/*_model_states.pt")


def read(path: Path) -> Parameters:
    """Raises ValueError (one line) for what does not hold."""
    if any(any(path.glob(pattern)) for pattern in RAW):
        raise ValueError(
            f"{path}: shards of DeepSpeed, which only running their code would read: where you trust them, "
            "python zero_to_fp32.py . consolidated there, then source=.../consolidated"
        )
    config, weights, trained = _read_consolidated(path) or _read_saved(path)
    return checked(from_dict(ModelConfig, config), weights, path, trained=trained)


def require_expressible(config: ModelConfig) -> None:
    """Ours has a field for everything."""


def write(parameters: Parameters, folder: Path, max_shard_size: str) -> list[str]:
    """Into an existing directory; returns the names of the files of weights."""
    checkpoints.save_weights(parameters.weights, parameters.config, folder, parameters.trained)
    return [checkpoints.WEIGHTS]


def _read_saved(path: Path) -> tuple[dict[str, Any], Weights, TrainConfig | None]:
    return *checkpoints.read_model(path), checkpoints.find_config(path)


def _read_consolidated(path: Path) -> tuple[dict[str, Any], Weights, TrainConfig | None] | None:
    """None where `path` is a checkpoint that `load_model` reads as it is."""
    if path.is_dir():
        saved = (path / checkpoints.WEIGHTS).is_file() and (path / "config.yaml").is_file()
        if saved or not has_weights(path):
            return None
        weights = read_weights_of(path)
    elif path.suffix in (".ckpt", ".safetensors", ".bin", ".pt", ".pth"):
        contents = read_contents(path)
        if {"state_dict", "config", "step"} <= contents.keys():
            return None
        weights = contents.get("state_dict", contents)
    else:
        return None
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder.parent, folder.parent.parent):
        if (place / "config.yaml").is_file():
            held: Any = OmegaConf.to_container(OmegaConf.load(place / "config.yaml"))
            trained = from_dict(TrainConfig, held) if "data" in held else None
            return (
                held.get("model", {}),
                {_unwrapped(name): value for name, value in weights.items()},
                trained,
            )
    raise ValueError(f"{path}: weights without a config: put the run's config.yaml beside them")


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    return name

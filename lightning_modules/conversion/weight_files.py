"""Files of weights, read as data only: safetensors, or PyTorch's archives with `weights_only=True`."""

import json
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]

SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"


def has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _names())


def read_weights_of(folder: Path) -> Weights:
    """The tensors of a directory: of one file, or of shards with their index; safetensors go first.

    Raises ValueError (one line) for a missing or damaged file, a shard that the index does not describe, or
    a file that holds more than tensors.
    """
    for name in _names():
        if not (folder / name).is_file():
            continue
        return _read_shards(folder, name) if name.endswith(".json") else read_file(folder / name)
    raise ValueError(f"{folder}: holds no weights: needs {SAFETENSORS} or {TORCH}, or shards and their index")


def read_file(file: Path) -> Weights:
    """The tensors of one file, by name. Raises ValueError (one line) as `read_weights_of`."""
    contents = read_contents(file)
    for name, value in contents.items():
        if not isinstance(name, str):
            raise ValueError(f"{file}: {name!r} is no name of a parameter: not a file of weights")
        if not isinstance(value, Tensor):
            raise ValueError(f"{file}: {name} is no tensor but {type(value).__name__}: not a file of weights")
        if value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{file}: {name} is sparse or without values: save it as a plain tensor")
    return contents


def read_contents(file: Path) -> dict[str, Any]:
    """What one file holds: a dictionary. Raises ValueError (one line) as `read_weights_of`."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Mapped, so that a model is never in memory twice; only archives can be.
        mapped = zipfile.is_zipfile(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that it then refuses
            contents = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped or None)
    except pickle.UnpicklingError as error:
        if "eights" not in str(error):  # torch's advice on weights_only, where a pickle wants to run code
            raise _damaged(file, error) from None
        raise ValueError(
            f"{file}: holds more than tensors, which only running its code would read: where you trust it, "
            "save it as safetensors"
        ) from None
    # Damage shows as almost any error: a bad archive, a short read, a missing record.
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise _damaged(file, error) from None
    if not isinstance(contents, dict):
        raise ValueError(f"{file}: holds a {type(contents).__name__}, not tensors by name")
    return contents


def write_safetensors(weights: Weights, folder: Path, max_shard_size: str) -> list[str]:
    """model.safetensors, or shards of at most `max_shard_size` and their index; returns the files' names."""
    from huggingface_hub import split_torch_state_dict_into_shards  # imported here: training needs none of it

    weights = {name: value.contiguous() for name, value in weights.items()}
    plan = split_torch_state_dict_into_shards(weights, max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return sorted(plan.filename_to_tensors)


def write_torch(weights: Weights, folder: Path) -> list[str]:
    """pytorch_model.bin: a plain dictionary of tensors."""
    torch.save({name: value.contiguous() for name, value in weights.items()}, folder / TORCH)
    return [TORCH]


def read_json(file: Path) -> dict[str, Any]:
    try:
        contents = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(contents, dict):
        raise ValueError(f"{file}: holds a {type(contents).__name__}, not settings by name")
    return contents


def _names() -> list[str]:
    return [SAFETENSORS, f"{SAFETENSORS}.index.json", TORCH, f"{TORCH}.index.json"]


def _read_shards(folder: Path, index: str) -> Weights:
    mapping = read_json(folder / index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(s, str) for s in mapping.values()):
        raise ValueError(f"{folder / index}: has no weight_map: it is no index of shards")
    weights: Weights = {}
    for shard in sorted(set(mapping.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{folder / index}: names {shard}: shards lie beside their index")
        if not (folder / shard).is_file():
            raise ValueError(f"{folder}: {index} names {shard}, which is not there: copy all shards")
        held = read_file(folder / shard)
        for name in held:
            if mapping.get(name) != shard:
                raise ValueError(f"{folder / shard}: holds {name}, which {index} does not place there")
        weights |= held
    for name, shard in mapping.items():
        if name not in weights:
            raise ValueError(f"{folder / shard}: has no {name}, which {index} places there")
    return weights


def _damaged(file: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:120]
    return ValueError(f"{file}: truncated or damaged ({type(error).__name__}: {reason}): use another copy")

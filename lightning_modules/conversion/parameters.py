"""A model as its config and its parameters, in our names, and whether the two belong together."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from conf.load import from_dict
from conf.schema import ModelConfig, TrainConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.conversion.weight_files import Weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"


@dataclass(frozen=True)
class Parameters:
    """weights: in our names and in the dtypes they were saved in; tied, without the head's.

    notes: what a reader of the source should know, a line each. trained: the training config, where known.
    """

    config: ModelConfig
    weights: Weights
    notes: list[str] = field(default_factory=list)
    trained: TrainConfig | None = None

    @property
    def nbytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.weights.values())

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest that holds every parameter."""
        dtypes = iter({value.dtype for value in self.weights.values()})
        dtype = next(dtypes)
        for other in dtypes:
            dtype = torch.promote_types(dtype, other)
        return dtype

    def checksum(self) -> str:
        """SHA-256 of every parameter's name, dtype, shape and bytes."""
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            value = self.weights[name].contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def model(self, dtype: torch.dtype = torch.float32) -> Mamba2LM:
        """The model itself, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            model = Mamba2LM(self.config)
        weights = self.weights
        if self.config.tie_embeddings:
            weights = {**weights, HEAD: weights[EMBEDDING]}
        model.load_state_dict(weights)
        return model.to(dtype).eval()


def model_config(file: object, settings: dict[str, Any]) -> ModelConfig:
    """`settings` in our names, checked. Raises ValueError (one line) that names the file."""
    try:
        return from_dict(ModelConfig, settings)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def checked(
    config: ModelConfig,
    weights: Weights,
    source: object,
    named: Callable[[str], str] = lambda name: name,
    notes: list[str] | None = None,
    trained: TrainConfig | None = None,
) -> Parameters:
    """`weights`, in our names, as the parameters of `config`'s model.

    named: a parameter's name in the source, for messages.

    Raises ValueError (one line) naming what is missing, unknown, of another shape, not finite or not tied.
    """
    expected = _shapes(config)
    _require_none(
        "has no parameter {}: it is incomplete or of another architecture",
        source,
        named,
        [name for name in expected if name not in weights and not _is_tied(config, name)],
    )
    _require_none(
        "holds {}, for which Mamba-2 of this config has no place",
        source,
        named,
        [name for name in weights if name not in expected],
    )
    for name, value in weights.items():
        if tuple(value.shape) != expected[name]:
            raise ValueError(
                f"{source}: {named(name)} has shape {tuple(value.shape)}, its config asks for "
                f"{expected[name]}: one of the two is another model's"
            )
        _require_finite(value, source, named(name))
    if config.tie_embeddings and HEAD in weights:
        if not torch.equal(weights[HEAD], weights[EMBEDDING]):
            raise ValueError(
                f"{source}: {named(HEAD)} differs from {named(EMBEDDING)} though the config ties them: "
                "set its tie_embeddings (tie_word_embeddings) to false"
            )
        weights = {name: value for name, value in weights.items() if name != HEAD}
    # Dtypes are kept, parameters in an order of their own: equal models are equal files.
    ordered = _separate({name: weights[name].detach() for name in expected if name in weights})
    return Parameters(config, ordered, notes or [], trained)


def _separate(weights: Weights) -> Weights:
    """Each in memory of its own, in order, as safetensors wants it: a .bin may share and transpose."""
    seen: set[int] = set()
    separate = {}
    for name, value in weights.items():
        value = value.contiguous()
        if value.untyped_storage().data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        separate[name] = value
    return separate


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return {name: tuple(value.shape) for name, value in Mamba2LM(config).state_dict().items()}


def _is_tied(config: ModelConfig, name: str) -> bool:
    return config.tie_embeddings and name == HEAD


def _require_none(message: str, source: object, named: Callable[[str], str], names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(f"{source}: {message.format(named(names[0]) + more)}")


def _require_finite(value: Tensor, source: object, name: str) -> None:
    if value.dtype not in DTYPES:
        raise ValueError(
            f"{source}: {name} is {value.dtype}, not floating point of 16 bits or more: quantised weights do "
            "not convert"
        )
    if bool(value.isfinite().all()):
        return
    where = (~value.isfinite()).reshape(-1).nonzero()[:, 0].tolist()
    found = value.reshape(-1)[where[0]].item()
    if name.endswith("A_log"):
        raise ValueError(
            f"{source}: {name} is {found} in {str(value.dtype)[6:]} at heads {where[:8]}: their decay was "
            "lost when it was cast; use a copy saved in float32 or bfloat16"
        )
    raise ValueError(
        f"{source}: {name} is {found} at {len(where)} places, first {where[0]}: use another copy"
    )

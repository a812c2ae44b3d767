"""The layout of transformers' Mamba2ForCausalLM: config.json with its names, safetensors, perhaps in shards.

Its embedding is `backbone.embeddings.weight`; all other parameters have our names. A tied head is left out of
the file. There is no field for D by channel, nor for the norm before the gate: published configs carry a
`norm_before_gate` that transformers ignores, and so it is here.
"""

import json
import math
from pathlib import Path
from typing import Any

from conf.schema import ModelConfig, is_power_of_two
from lightning_modules.conversion.parameters import EMBEDDING, Parameters, checked, model_config
from lightning_modules.conversion.weight_files import read_json, read_weights_of, write_safetensors

THEIR_EMBEDDING = "backbone.embeddings.weight"
REQUIRED = {  # their name -> ours
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "vocab_size": "vocab_size",
    "state_size": "d_state",
    "head_dim": "headdim",
    "n_groups": "n_groups",
}
OPTIONAL: dict[str, tuple[str, Any]] = {  # their name -> ours, and the default of their Mamba2Config
    "expand": ("expand", 2),
    "conv_kernel": ("d_conv", 4),
    "layer_norm_epsilon": ("norm_eps", 1e-5),
    "time_step_min": ("dt_min", 0.001),
    "time_step_max": ("dt_max", 0.1),
    "time_step_floor": ("dt_init_floor", 1e-4),
    "time_step_limit": ("dt_limit", (0.0, math.inf)),
    "tie_word_embeddings": ("tie_embeddings", False),
    "initializer_range": ("init_std", 0.1),
    "chunk_size": ("chunk_size", 256),
}
FIXED = {"use_bias": False, "use_conv_bias": True, "hidden_act": "silu", "rms_norm": True}
CHUNK = 256  # where theirs is no power of two: speed only


def is_layout(config: dict[str, Any]) -> bool:
    return config.get("model_type") == "mamba2"


def read(folder: Path) -> Parameters:
    """Raises ValueError (one line) for what does not hold."""
    file = folder / "config.json"
    config = read_json(file)
    for name in (*REQUIRED, "num_heads"):
        if config.get(name) is None:
            raise ValueError(
                f"{file}: has no {name}: transformers would fill in another model's; add it to the file"
            )
        if type(config[name]) is not int:
            raise ValueError(f"{file}: {name}={config[name]!r}: must be a whole number, without quotes")
    if config.get("quantization_config") is not None:
        raise ValueError(f"{file}: has a quantization_config: quantised weights do not convert")
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"{file}: {name}={config[name]}: our Mamba-2 has {value} there and nothing else")
    settings = {ours: config[theirs] for theirs, ours in REQUIRED.items()}
    for theirs, (ours, default) in OPTIONAL.items():
        try:
            settings[ours] = _value(config.get(theirs, default))
        except (TypeError, ValueError):
            raise ValueError(f"{file}: {theirs}={config[theirs]}: is no number") from None
    chunk = settings["chunk_size"]
    if isinstance(chunk, int) and (not is_power_of_two(chunk) or chunk < 16):
        settings["chunk_size"] = CHUNK
    model = model_config(file, settings)
    if model.n_heads != config["num_heads"]:
        raise ValueError(
            f"{file}: num_heads={config['num_heads']}: expand * hidden_size / head_dim is {model.n_heads}"
        )
    weights = {_ours(name): value for name, value in read_weights_of(folder).items()}
    return checked(model, weights, folder, _theirs)


def require_expressible(config: ModelConfig) -> None:
    """Raises ValueError (one line) for what this layout has no field for."""
    for name, what in (("norm_before_gate", "the norm before the gate"), ("d_has_hdim", "D by channel")):
        if getattr(config, name):
            raise ValueError(
                f"layout=hf: transformers' Mamba2 has no field for model.{name}=true ({what}): "
                "use layout=ours or state-spaces"
            )


def write(
    parameters: Parameters,
    folder: Path,
    max_shard_size: str,
    special_ids: dict[str, int | None] | None = None,
) -> list[str]:
    """Into an existing directory; returns the names of the files of weights.

    special_ids: bos_token_id, eos_token_id and pad_token_id of the tokenizer, where there is one.
    """
    config = parameters.config
    settings: dict[str, Any] = {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        **{theirs: getattr(config, ours) for theirs, ours in REQUIRED.items()},
        "num_heads": config.n_heads,
        **{theirs: getattr(config, ours) for theirs, (ours, _) in OPTIONAL.items()},
        **FIXED,
        "residual_in_fp32": True,
        "use_cache": True,
        "dtype": str(parameters.dtype)[6:],
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **(special_ids or {}),
    }
    if config.dt_limit == OPTIONAL["time_step_limit"][1]:
        del settings["time_step_limit"]  # their default; JSON has no infinity
    else:
        settings["time_step_limit"] = [_as_json(limit) for limit in config.dt_limit]
    (folder / "config.json").write_text(json.dumps(settings, indent=2, allow_nan=False) + "\n")
    weights = {_theirs(name): value for name, value in parameters.weights.items()}
    return write_safetensors(weights, folder, max_shard_size)


def _ours(name: str) -> str:
    return EMBEDDING if name == THEIR_EMBEDDING else name


def _theirs(name: str) -> str:
    return THEIR_EMBEDDING if name == EMBEDDING else name


def _as_json(value: float) -> Any:
    """A number as transformers writes it."""
    return {"__float__": "Infinity"} if math.isinf(value) else value


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_value(item) for item in value)
    if isinstance(value, dict) and "__float__" in value:
        return float(value["__float__"])
    return value

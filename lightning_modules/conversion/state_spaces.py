"""The layout of the public state-spaces checkpoints: config.json with mamba_ssm's names, pytorch_model.bin.

Parameters have our names. The head is in the file also where it is tied. `vocab_size` counts tokens; the
embedding has a multiple of `pad_vocab_size_multiple` rows, which is our `vocab_size`.
"""

import json
from pathlib import Path
from typing import Any

from conf.schema import ModelConfig
from lightning_modules.conversion.parameters import EMBEDDING, HEAD, Parameters, checked, model_config
from lightning_modules.conversion.weight_files import read_json, read_weights_of, write_torch

SSM: dict[str, tuple[str, Any]] = {  # their name -> ours, and the default of mamba_ssm's Mamba2
    "d_state": ("d_state", 128),
    "d_conv": ("d_conv", 4),
    "expand": ("expand", 2),
    "headdim": ("headdim", 64),
    "ngroups": ("n_groups", 1),
    "D_has_hdim": ("d_has_hdim", False),
    "norm_before_gate": ("norm_before_gate", False),
    "chunk_size": ("chunk_size", 256),
    "dt_min": ("dt_min", 0.001),
    "dt_max": ("dt_max", 0.1),
    "dt_init_floor": ("dt_init_floor", 1e-4),
    "dt_limit": ("dt_limit", (0.0, float("inf"))),
    "A_init_range": ("A_init_range", (1.0, 16.0)),
}
# Settings of which our model has one value, and names of how theirs is run, which change no result.
FIXED_SSM = {"rmsnorm": True, "bias": False, "conv_bias": True, "d_ssm": None}
FIXED = {"rms_norm": True, "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}}
WITHOUT_EFFECT = {"conv_init", "use_mem_eff_path", "layer", "sequence_parallel"}
OTHERS = {
    "residual_in_fp32",
    "fused_add_norm",
    "architectures",
    "torch_dtype",
    "dtype",
    "transformers_version",
}
REQUIRED = ("d_model", "n_layer", "vocab_size")
NORM_EPS = 1e-5  # theirs has no field for it
PAD = 16


def is_layout(config: dict[str, Any]) -> bool:
    return "model_type" not in config and {"d_model", "n_layer"} <= config.keys()


def read(folder: Path) -> Parameters:
    """Raises ValueError (one line) for what does not hold."""
    file = folder / "config.json"
    config = read_json(file)
    ssm = config.get("ssm_cfg", {})
    if not isinstance(ssm, dict):
        raise ValueError(f"{file}: ssm_cfg={ssm}: must hold settings by name")
    _require_known(file, config, ssm)
    for name in REQUIRED:
        if name not in config:
            raise ValueError(f"{file}: has no {name}: it is incomplete")
    tokens, multiple = config["vocab_size"], config.get("pad_vocab_size_multiple", 8)
    for name, value in (("vocab_size", tokens), ("pad_vocab_size_multiple", multiple)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{file}: {name}={value}: must be a whole number of at least 1")
    weights = read_weights_of(folder)
    rows = -(-tokens // multiple) * multiple
    notes = []
    if EMBEDDING in weights and weights[EMBEDDING].shape[0] == tokens:
        rows = tokens  # never padded
    elif rows != tokens:
        notes.append(
            f"vocabulary: {tokens} tokens padded to {rows} rows (pad_vocab_size_multiple={multiple}): the "
            f"last {rows - tokens} are no token's"
        )
    settings = {ours: _plain(ssm.get(theirs, default)) for theirs, (ours, default) in SSM.items()}
    settings |= {"d_model": config["d_model"], "n_layers": config["n_layer"], "vocab_size": rows}
    settings |= {"tie_embeddings": config.get("tie_embeddings", True), "norm_eps": NORM_EPS}
    return checked(model_config(file, settings), weights, folder, notes=notes)


def require_expressible(config: ModelConfig) -> None:
    """Raises ValueError (one line) for what this layout has no field for."""
    if config.norm_eps != NORM_EPS:
        raise ValueError(
            f"layout=state-spaces: has no field for model.norm_eps={config.norm_eps} (its is {NORM_EPS}): "
            "use layout=ours or hf"
        )


def write(parameters: Parameters, folder: Path, max_shard_size: str) -> list[str]:
    """Into an existing directory; returns the names of the files of weights."""
    config = parameters.config
    ssm = {"layer": "Mamba2"}
    ssm |= {
        theirs: value
        for theirs, (ours, default) in SSM.items()
        if _plain(value := getattr(config, ours)) != default
    }
    settings = {
        "d_model": config.d_model,
        "d_intermediate": 0,
        "n_layer": config.n_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": ssm,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": PAD if config.vocab_size % PAD == 0 else 1,
        "tie_embeddings": config.tie_embeddings,
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=4) + "\n")
    weights = dict(parameters.weights)
    if config.tie_embeddings:
        weights[HEAD] = weights[EMBEDDING]
    return write_torch(weights, folder)


def _require_known(file: Path, config: dict[str, Any], ssm: dict[str, Any]) -> None:
    layer = ssm.get("layer", "Mamba1")
    if layer != "Mamba2":
        raise ValueError(f"{file}: ssm_cfg.layer={layer}: not Mamba-2; only Mamba-2 converts")
    named = {*REQUIRED, "ssm_cfg", "pad_vocab_size_multiple", "tie_embeddings", *OTHERS}
    for where, held, known, fixed in (
        ("", config, named, FIXED),
        ("ssm_cfg.", ssm, {*SSM, *WITHOUT_EFFECT}, FIXED_SSM),
    ):
        for name, value in held.items():
            if name in fixed and value != fixed[name]:
                raise ValueError(
                    f"{file}: {where}{name}={value}: our Mamba-2 has {fixed[name]} there and nothing else"
                )
            if name not in known and name not in fixed:
                raise ValueError(f"{file}: {where}{name}={value}: unknown setting; its effect cannot be told")


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

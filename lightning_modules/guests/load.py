"""Which directories hold a guest, and loading one: as data only, whole, from this machine alone."""

from pathlib import Path
from typing import Any

import torch

from lightning_modules.backbone import Mamba2LM
from lightning_modules.checkpoints import load_model
from lightning_modules.conversion.published import is_published
from lightning_modules.conversion.weight_files import read_json
from lightning_modules.guests.gated_delta import GatedDelta
from lightning_modules.guests.guest import Family, Guest, GuestConfig
from lightning_modules.guests.mamba import Mamba
from lightning_modules.guests.mamba2 import Mamba2Guest
from lightning_modules.guests.rwkv import Rwkv, without_downloaded_kernels

FAMILIES: dict[str, type[Family]] = {
    "mamba": Mamba,
    "falcon_mamba": Mamba,
    "mamba2": Mamba2Guest,
    "rwkv": Rwkv,
    "qwen3_next": GatedDelta,
}


def is_guest(path: str | Path) -> bool:
    """Whether `path` holds what our own model cannot be: another family, or Mamba-2 with other biases.

    Raises ValueError (one line) for a model of transformers that is neither.
    """
    path = Path(path)
    if not is_published(path):
        return False
    config = read_json(path / "config.json")
    kind = config.get("model_type")
    if kind is None:
        return False
    _require_family(path, kind)
    ours = not config.get("use_bias", False) and config.get("use_conv_bias", True)
    return not (kind == "mamba2" and ours)


def guest_config(path: str | Path) -> GuestConfig:
    path = Path(path)
    theirs = _their_config(path)
    try:
        return FAMILIES[theirs.model_type]().config(theirs)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_guest(path: str | Path, device: torch.device | str = "cpu") -> Guest:
    """The guest at `path`, in fp32. Raises ValueError (one line) if it is incomplete or of no family here."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    path = Path(path)
    guest_config(path)  # told before weights are read
    theirs = _their_config(path)
    logging.set_verbosity_error()  # its advice on kernels for GPUs
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]), without_downloaded_kernels():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, by name
            )
    except Exception as error:  # transformers raises OSError, ValueError, RuntimeError and others here
        if "Weights only load failed" in str(error):  # its advice is to run the code
            raise ValueError(
                f"{path}: holds more than tensors, which only running its code would read"
            ) from None
        raise ValueError(f"{path}: cannot be loaded ({_said(error)})") from None
    model, info = loaded
    for name, held, asked in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"{path}: {name} has shape {tuple(held)}, its config asks for {tuple(asked)}: one of the two is "
            "another model's"
        )
    # It would draw at random what is missing, and go on.
    for kind, what in (("missing_keys", "has no"), ("unexpected_keys", "holds, without a place for it,")):
        if names := sorted(info[kind]):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{path}: {what} {names[0]}{more}: it is incomplete or another model's")
    for name, value in model.named_parameters():
        if not bool(value.isfinite().all()):
            raise ValueError(f"{path}: {name} is not finite everywhere: use another copy")
    return Guest(model, FAMILIES[theirs.model_type]()).to(device)


def load_subject(path: str | Path, device: torch.device | str = "cpu") -> Mamba2LM | Guest:
    """What a measuring command reads: our own model, or a guest."""
    return load_guest(path, device) if is_guest(path) else load_model(path, device=device)


def _their_config(path: Path) -> Any:
    from transformers import AutoConfig

    _require_family(path, read_json(path / "config.json").get("model_type"))
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its checks of values have classes of their own
        raise ValueError(f"{path / 'config.json'}: does not hold ({_said(error)})") from None


def _require_family(path: Path, kind: object) -> None:
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"{path / 'config.json'}: model_type={kind}: neither Mamba-2 nor a guest known here: known are "
            f"{', '.join(FAMILIES)}"
        )


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

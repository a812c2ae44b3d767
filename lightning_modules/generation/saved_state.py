"""A recurrent state on disk: what was read once need not be read again.

A safetensors file: data only, no code runs when it is read. Its header names the model, the mitigation and
how many tokens each row has read.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from conf.load import to_dict
from lightning_modules import measuring
from lightning_modules.backbone import Mamba2LM
from lightning_modules.calibration.file import fingerprint
from lightning_modules.mitigations import LayerMitigations
from lightning_modules.state import ModelState

FORMAT = "longstate state 1"


def save_state(path: str | Path, state: ModelState, model: Mamba2LM) -> None:
    """Write a state of this model, at once or not at all."""
    path = Path(path).resolve()  # a link stays one
    header = {
        "format": FORMAT,
        "model": model_identity(model),
        "mitigation": state.mitigation,
        "tokens": json.dumps(state.position.tolist()),
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in _named(state).items()}
    try:
        # A name of its own: of two that write the same state one is whole in the end.
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata=header)
            os.chmod(temporary, 0o666 & ~_umask())  # safetensors and mkstemp let nobody else read it
            os.replace(temporary, path)
        finally:  # also of Ctrl-C
            Path(temporary).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"save_state={path}: cannot be written ({reason}): choose another place") from None


def require_writable(path: str | Path) -> None:
    """Refuse a place that cannot be written, before a long prompt is read, and what is no state of ours."""
    measuring.require_writable("save_state", path)
    if os.path.exists(path) and not _is_state(Path(path)):
        raise ValueError(f"save_state={path}: exists and is no saved state: it stays; name another file")


def _is_state(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get("format")).startswith(FORMAT[:-1])
    except (SafetensorError, OSError):
        return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_header(path: str | Path) -> dict[str, str]:
    """What the file at `path` says of itself: format, model, mitigation and tokens.

    Cheap: no state is read, so that a missing or foreign file is told before a model is loaded.

    Raises:
        ValueError: the file is missing, damaged or none of ours.
    """
    if not os.path.isfile(path):
        raise ValueError(f"state={path}: no such file; make one with save_state=PATH")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None
    if header.get("format") != FORMAT or not {"model", "mitigation", "tokens"} <= header.keys():
        raise ValueError(f"state={path}: no saved state of this version; make it again with save_state=PATH")
    return header


def tokens_read(header: dict[str, str]) -> list[int]:
    """Of every row."""
    return json.loads(header["tokens"])


def _unreadable(path: str | Path, error: Exception) -> ValueError:
    return ValueError(f"state={path}: truncated or damaged, or no saved state ({error})")


def load_state(
    path: str | Path, model: Mamba2LM, mitigation: LayerMitigations, device: torch.device | str
) -> ModelState:
    """The state at `path`, of this very model under this mitigation.

    Raises:
        ValueError: the file is missing, damaged or none of ours; of another model or mitigation.
    """
    name, header = f"state={path}", read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None
    if header["model"] != model_identity(model):
        raise ValueError(
            f"{name}: of another model, or of this one before it was trained on or in another dtype: "
            "use the checkpoint and dtype that it was made with"
        )
    if header["mitigation"] != mitigation.key:
        raise ValueError(
            f"{name}: read under mitigation {header['mitigation']}, not {mitigation.key}: "
            "use the same, or read the text again"
        )
    rows = len(tokens_read(header))
    own = ModelState.zeros(model.config, rows, "meta", model.lm_head.weight.dtype, mitigation)
    expected = {key: (t.shape, t.dtype) for key, t in _named(own).items()}
    if {key: (t.shape, t.dtype) for key, t in tensors.items()} != expected:
        raise ValueError(f"{name}: damaged: its tensors are not those of this model's states")
    return own.with_tensors(tensors[key].to(device) for key in expected)


def model_identity(model: Mamba2LM) -> str:
    """Hash of the config, as far as it changes results, of the weights and of their dtype."""
    config = {key: value for key, value in to_dict(model.config).items() if key != "chunk_size"}
    told = [config, str(model.lm_head.weight.dtype), fingerprint(model)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _named(state: ModelState) -> dict[str, Tensor]:
    """The tensors of a state, in the order of `ModelState.tensors()`."""
    parts = [f"layer{i}.{part}" for i, s in enumerate(state.layers) for part in range(len(s.tensors()))]
    return dict(zip([*parts, "position"], state.tensors(), strict=True))

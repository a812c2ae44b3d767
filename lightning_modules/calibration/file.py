"""The file of a calibration: what was found for every layer and head, of which weights, and how."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conf.mitigation import CALIBRATED
from conf.schema import ModelConfig
from lightning_modules.run_dir import write_json

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What one calibration found.

    weights: `fingerprint` of the model it belongs to. settings: how it was made. values: of state_norm the
    largest norms (layers, heads); of delta_scale and decay_scale a factor a layer (layers,); of token_filter
    thresholds (lengths, layers, heads) for prompts of `lengths` tokens, ascending. found: what else was seen.
    """

    mitigation: str
    checkpoint: str
    weights: str
    n_layers: int
    n_heads: int
    settings: dict[str, Any]
    values: list[Any]
    lengths: list[int] | None = None
    found: dict[str, Any]

    def at(self, length: int | None) -> Tensor:
        """The values, (layers, heads) or (layers,) fp64; token_filter's for prompts of `length` tokens.

        Between two lengths of the table linear in the logarithm of the length; zero up to the first, the last
        beyond the last. Raises ValueError for a token_filter without a length.
        """
        values = torch.tensor(self.values, dtype=torch.float64)
        if self.lengths is None:
            return values
        if length is None:
            raise ValueError(
                "mitigation.length=None: calibrated thresholds depend on a prompt's tokens; give their number"
            )
        logs = torch.tensor(self.lengths, dtype=torch.float64).log2()
        place = torch.tensor(float(length), dtype=torch.float64).log2().clamp(logs[0], logs[-1])
        above = int(torch.searchsorted(logs, place).clamp(1, len(logs) - 1))
        share = (place - logs[above - 1]) / (logs[above] - logs[above - 1])
        return torch.lerp(values[above - 1], values[above], share)

    def require_model(self, path: Path, config: ModelConfig) -> None:
        """Refuse a model of another shape."""
        ours, theirs = (config.n_layers, config.n_heads), (self.n_layers, self.n_heads)
        if ours != theirs:
            raise ValueError(
                f"mitigation.calibration={path}: of a model of {theirs[0]} layers x {theirs[1]} heads, this "
                f"one has {ours[0]} x {ours[1]}: calibrate this checkpoint"
            )

    def require_weights(self, path: Path, model: nn.Module) -> None:
        """Refuse a model of other weights."""
        if fingerprint(model) != self.weights:
            raise ValueError(
                f"mitigation.calibration={path}: belongs to other weights, those of {self.checkpoint} when "
                "it was made: calibrate this checkpoint"
            )

    def write(self, path: Path) -> None:
        """Raises ValueError (one line) if the place cannot be written."""
        try:
            write_json(path, {"format": FORMAT} | {k: v for k, v in asdict(self).items() if v is not None})
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"output={path}: cannot be written ({reason}): choose another place") from None


def read_calibration(path: str | Path, mitigation: str) -> Calibration:
    """Read a calibration of `mitigation`. Raises ValueError (one line) where there is none."""
    name = f"mitigation.calibration={path}"
    try:
        contents = json.loads(Path(path).read_text())
        if contents.pop("format") != FORMAT:
            raise ValueError(f"not of format {FORMAT}")
        calibration = Calibration(**contents)
    except OSError as error:
        raise ValueError(
            f"{name}: cannot be read ({error.strerror}); make one: python -m lightning_modules.calibrate "
            f"checkpoint=PATH mitigation.name={mitigation}"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{name}: no calibration, or damaged ({error}): make it again") from None
    if calibration.mitigation != mitigation:
        raise ValueError(
            f"{name}: of {calibration.mitigation}, not of mitigation.name={mitigation}: give that one's own"
        )
    assert calibration.mitigation in CALIBRATED
    return calibration


def beside(checkpoint: str | Path, mitigation: str) -> Path:
    """Where the calibration of a checkpoint lies: in its directory, or next to its file."""
    path, name = Path(checkpoint), f"calibration-{mitigation}.json"
    return path / name if path.is_dir() else path.with_name(f"{path.stem}.{name}")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names, shapes and fp32 values of a model's parameters, wherever they lie."""
    digest = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):  # a tied one is named once
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

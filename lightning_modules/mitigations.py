"""From the config's mitigation to the scans': one rule for every layer."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.mitigation import CALIBRATED, MITIGATION_OWNERS, MitigationConfig
from conf.schema import ModelConfig
from kernels.ssd import Mitigation
from lightning_modules.calibration.file import read_calibration


@dataclass(frozen=True)
class LayerMitigations:
    """A mitigation for every layer of a model, in order."""

    layers: tuple[Mitigation, ...]

    @cached_property
    def key(self) -> str:
        """What a recurrent state remembers: that of the layers where they agree, else a hash of them all."""
        keys = [rule.key for rule in self.layers]
        if len(set(keys)) == 1:
            return keys[0]
        name = next(rule.name for rule in self.layers if rule.name != "none")
        return f"{name}(by layer, {hashlib.sha256(repr(keys).encode()).hexdigest()[:16]})"

    def on(self, device: torch.device) -> tuple[Mitigation, ...]:
        """The layers' rules with their tensors on `device`; copied there once."""
        copies: dict[torch.device, tuple[Mitigation, ...]] = self.__dict__.setdefault("_copies", {})
        if device not in copies:
            # Not inside inference mode, whose tensors no later training step could use.
            with torch.inference_mode(False):
                copies[device] = tuple(_move(rule, device) for rule in self.layers)
        return copies[device]


AnyMitigation = Mitigation | LayerMitigations


def for_layers(mitigation: AnyMitigation | None, n_layers: int) -> LayerMitigations:
    """One rule for every layer: the same for all where a single one is given, none for None."""
    if isinstance(mitigation, LayerMitigations):
        if len(mitigation.layers) != n_layers:
            raise ValueError(f"mitigation: has {len(mitigation.layers)} layers, the model {n_layers}")
        return mitigation
    return LayerMitigations((mitigation or Mitigation(),) * n_layers)


def build_mitigation(
    config: MitigationConfig, model: ModelConfig, *, length: int | None = None
) -> LayerMitigations:
    """The mitigation of a config for a model of this shape.

    length: tokens of the prompts to come, for calibrated thresholds that depend on it; mitigation.length
    comes before it.

    Raises:
        ValueError: a layer or head that the model lacks; a calibration that cannot be read or belongs to a
            model of another shape (whose weights it belongs to is for those to check who have a model).
    """
    chosen = config.chosen_heads(model.n_layers, model.n_heads)
    settings = {name: getattr(config, name) for name in MITIGATION_OWNERS if name != "length"}
    calibrated = CALIBRATED[config.name] if config.calibration is not None else None
    values = _calibrated(config, model, length) if config.calibration is not None else None
    rules = []
    for layer in range(model.n_layers):
        heads = None if chosen is None else chosen.get(layer, ())
        own: dict[str, Any] = {}
        if calibrated is not None and values is not None:
            own = {calibrated: values[layer] if values.dim() == 2 else float(values[layer])}
        if heads == () or (calibrated == "threshold" and values is not None and not values[layer].any()):
            rules.append(Mitigation())
        else:
            rules.append(Mitigation(config.name, **settings | own, heads=heads))
    return LayerMitigations(tuple(rules))


def _calibrated(config: MitigationConfig, model: ModelConfig, length: int | None) -> Tensor:
    """What the calibration gives, (layers, heads) or (layers,)."""
    path = Path(config.calibration or "")
    calibration = read_calibration(path, config.name)
    calibration.require_model(path, model)
    return config.calibration_scale * calibration.at(config.length or length)


def _move(rule: Mitigation, device: torch.device) -> Mitigation:
    tensors = {name: t for name, t in vars(rule).items() if isinstance(t, Tensor)}
    moved: dict[str, Any] = {name: t.to(device) for name, t in tensors.items() if t.device != device}
    return replace(rule, **moved) if moved else rule

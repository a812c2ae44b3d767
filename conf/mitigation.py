"""Settings of a mitigation: which, how strong, and in which layers and heads (kernels/ssd/mitigation.py)."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from conf.fields import option, require

# Which mitigations take a setting. What a calibration measures for every head stands in the setting's place.
MITIGATION_OWNERS = {
    "alpha_scale": ("forget_more",),
    "insert_scale": ("forget_more",),
    "delta_scale": ("delta_scale",),
    "decay_scale": ("decay_scale",),
    "max_norm": ("state_norm",),
    "every": ("state_norm", "hard_reset"),
    "window": ("sliding_window",),
    "threshold": ("token_filter",),
    "length": ("token_filter",),
}
CALIBRATED = {
    "state_norm": "max_norm",
    "token_filter": "threshold",
    "delta_scale": "delta_scale",
    "decay_scale": "decay_scale",
}
MITIGATIONS = tuple(dict.fromkeys(name for names in MITIGATION_OWNERS.values() for name in names))


@dataclass(kw_only=True)
class MitigationConfig:
    """One training-free change of the recurrence (see kernels/ssd/mitigation.py)."""

    name: Literal[
        "none",
        "forget_more",
        "delta_scale",
        "decay_scale",
        "state_norm",
        "sliding_window",
        "hard_reset",
        "token_filter",
        "all",
    ] = option("none", "which mitigation; evaluate: all compares them")
    alpha_scale: float = option(1.0, "forget_more: multiplies the retention exp(dt * A); in (0, 1]")
    insert_scale: float = option(1.0, "forget_more: multiplies the insertion dt * B x; in (0, 1]")
    delta_scale: float = option(1.0, "delta_scale: multiplies dt after softplus and limits; positive")
    decay_scale: float = option(1.0, "decay_scale: multiplies A; positive")
    max_norm: float | None = option(None, "state_norm: largest Frobenius norm of a head's state; positive")
    every: int | None = option(
        None, "state_norm, hard_reset: clip or zero the state every so many tokens, from the document's start"
    )
    window: int | None = option(None, "sliding_window: y_t sees exactly the last so many tokens")
    threshold: float | None = option(None, "token_filter: tokens of a smaller dt leave the state as it is")
    layers: list[int] = option([], "only in these layers, from 0; with heads empty too: in all")
    heads: list[str] = option([], "only in these heads, e.g. [L0H3,L2H17] (layer 0 head 3, ...); from 0")
    calibration: str | None = option(
        None, "values per head from this file of the checkpoint; auto: its own, made first if it has none"
    )
    calibration_scale: float = option(1.0, "multiplies the calibrated values; positive")
    length: int | None = option(
        None, "token_filter, calibrated: tokens that the thresholds are for; none: the prompt's (evaluate)"
    )

    def __post_init__(self) -> None:
        calibrated = self._check_calibration()
        for setting, owners in MITIGATION_OWNERS.items():
            name, value = f"mitigation.{setting}", getattr(self, setting)
            owned, neutral = self.name in owners, NEUTRAL_SETTINGS[setting]
            remedy = f"belongs to {' and '.join(owners)}; set mitigation.name={owners[0]} or leave it out"
            require(owned or value == neutral, name, value, remedy)
            if not owned:
                continue
            if setting == calibrated:
                require(value == neutral, name, value, "the calibration gives it; leave it out")
            elif setting == "length":
                require(value is None or calibrated is not None, name, value, "needs mitigation.calibration")
                require(value is None or value >= 1, name, value, "must be at least 1")
            else:
                _check(self.name, setting, value)
        for name, value in (("layers", self.layers), ("heads", self.heads)):
            one = not value or self.name in MITIGATIONS
            require(one, f"mitigation.{name}", value, "choose a mitigation: mitigation.name")
        require(all(layer >= 0 for layer in self.layers), "mitigation.layers", self.layers, "count from 0")
        for head in self.heads:
            require(_parse(head) is not None, "mitigation.heads", head, "write L2H17 for layer 2, head 17")

    def require_single(self) -> None:
        """Refuse `all`, which only a comparison knows what to do with."""
        require(self.name != "all", "mitigation.name", "all", "only evaluate compares all; choose one")

    def chosen_heads(self, n_layers: int, n_heads: int) -> dict[int, tuple[int, ...]] | None:
        """layer -> its heads under the mitigation; None for all heads of all layers.

        Raises ValueError for a layer or head that a model of `n_layers` x `n_heads` does not have.
        """
        if not (self.layers or self.heads):
            return None
        chosen: dict[int, set[int]] = {}
        unknown = [layer for layer in self.layers if layer >= n_layers]
        require(not unknown, "mitigation.layers", unknown, f"the layers are 0 to {n_layers - 1}")
        for layer in self.layers:
            chosen[layer] = set(range(n_heads))
        for name in self.heads:
            layer, head = _parse(name) or (-1, -1)
            known = layer < n_layers and head < n_heads
            remedy = f"the layers are 0 to {n_layers - 1}, the heads 0 to {n_heads - 1}"
            require(known, "mitigation.heads", name, remedy)
            chosen.setdefault(layer, set()).add(head)
        return {layer: tuple(sorted(heads)) for layer, heads in chosen.items()}

    def _check_calibration(self) -> str | None:
        """The setting that a calibration gives, if there is one."""
        able = ", ".join(CALIBRATED)
        calibrated = CALIBRATED.get(self.name) if self.calibration is not None else None
        wrong = self.calibration is not None and calibrated is None
        require(not wrong, "mitigation.calibration", self.calibration, f"belongs to {able}")
        scale = self.calibration_scale
        remedy = "must be positive and finite"
        require(0 < scale < math.inf, "mitigation.calibration_scale", scale, remedy)
        needs = scale == 1 or calibrated is not None
        require(needs, "mitigation.calibration_scale", scale, "needs mitigation.calibration")
        return calibrated


NEUTRAL_SETTINGS = {f.name: getattr(MitigationConfig, f.name, []) for f in fields(MitigationConfig)}
del NEUTRAL_SETTINGS["name"]


def changed_settings(mitigation: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a mitigation that change something, without its name."""
    given = {name: mitigation.get(name, neutral) for name, neutral in NEUTRAL_SETTINGS.items()}
    return {name: value for name, value in given.items() if value != NEUTRAL_SETTINGS[name]}


def _check(owner: str, setting: str, value: Any) -> None:
    name = f"mitigation.{setting}"
    calibrated = CALIBRATED.get(owner) == setting
    or_else = f"{owner} needs it" + (", or mitigation.calibration" if calibrated else "")
    require(value is not None, name, value, or_else)
    if setting in ("every", "window"):
        require(value >= 1, name, value, "must be at least 1")
    elif setting in ("alpha_scale", "insert_scale"):
        require(0 < value <= 1, name, value, "must lie in (0, 1]")
    elif setting == "threshold":
        require(0 <= value < math.inf, name, value, "must be finite and not negative")
    else:
        require(0 < value < math.inf, name, value, "must be positive and finite")


def _parse(head: str) -> tuple[int, int] | None:
    """L2H17 -> (2, 17); None for anything else."""
    found = re.fullmatch(r"L(\d+)H(\d+)", head)
    return (int(found[1]), int(found[2])) if found else None

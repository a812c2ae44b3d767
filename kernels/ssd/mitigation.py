"""Training-free changes of the recurrence.

Factors, pointwise in the token (`discretize.py`), so they cost nothing beside the scan:

    h_t = alpha_scale * exp(dt'_t * decay_scale * A) * h_{t-1} + insert_scale * dt'_t * x_t B_t^T
    dt'_t = delta_scale * clamp(softplus(dt_t + dt_bias), dt_limit)

Operators, composed from scans (`operators.py`, `window.py`): state_norm, sliding_window, hard_reset.
`D x_t` is never scaled.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

SETTINGS = {
    "forget_more": ("alpha_scale", "insert_scale"),
    "delta_scale": ("delta_scale",),
    "decay_scale": ("decay_scale",),
    "state_norm": ("max_norm", "every"),
    "sliding_window": ("window",),
    "hard_reset": ("every",),
}
FACTORS = ("alpha_scale", "insert_scale", "delta_scale", "decay_scale")


@dataclass(frozen=True)
class Mitigation:
    """One mitigation: a name and its settings. Any other name labels a combination of factors.

    Factors and `max_norm` are floats, or tensors (H,) with one value per head. Tokens are counted from the
    start of the row or document.

    forget_more (alpha_scale, insert_scale): "forget more and remember less", arXiv 2410.07145 section 3.2.
        Bounds the memory of every head to about 1 / (1 - alpha_scale) tokens. Cannot tell important tokens
        from filler: recall of far needles falls with it, and a low insert_scale weakens near ones too.
    delta_scale: constant scaling of dt, both decay and insertion ("LongMamba" of that paper's comparison;
        arXiv 2504.16053 refines it). Below 1 it stretches time; it cannot create forgetting.
    decay_scale: A scaled (Mamba Modulation, arXiv 2509.19633). Above 1 every head forgets faster in
        proportion to its own rate; a head with retention exactly 1 stays at 1.
    state_norm (max_norm, every): after every k = `every` tokens the Frobenius norm of a head's P x N state
        is scaled down to at most `max_norm` (arXiv 2410.07145 section 3.2); inf: that head never. y of that
        token still reads the whole state unless k = 1. Bounds the state, not what is in it; serial in time.
    sliding_window (window): y_t sees exactly the tokens (t - r, t] of its document, r = `window` (the same
        paper). Forgets everything older, whatever its worth; the state is a `Window`.
    hard_reset (every): the state is zeroed before every r-th token: the control. Right after a reset nothing
        is remembered.
    """

    name: str = "none"
    alpha_scale: float | Tensor = 1.0
    insert_scale: float | Tensor = 1.0
    delta_scale: float | Tensor = 1.0
    decay_scale: float | Tensor = 1.0
    max_norm: float | Tensor | None = None
    every: int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        owned = () if self.name == "none" else SETTINGS.get(self.name, FACTORS)
        for setting, value in self._settings().items():
            given = isinstance(value, Tensor) or value not in (1.0 if setting in FACTORS else None,)
            if given and setting not in owned:
                owners = " or ".join(name for name, settings in SETTINGS.items() if setting in settings)
                raise ValueError(f"{setting}={value}: not a setting of {self.name}; use name={owners!r}")
            if setting in owned:
                _check(self.name, setting, value)

    @property
    def composed(self) -> bool:
        """Whether it is built of several scans rather than factors inside one."""
        return any(setting is not None for setting in (self.max_norm, self.every, self.window))

    @cached_property
    def key(self) -> str:
        """What a recurrent state remembers of the mitigation that made it; equal keys may share a state."""
        if self.name == "none":
            return "none"
        owned = SETTINGS.get(self.name, FACTORS)
        values = {
            s: v.tolist() if isinstance(v, Tensor) else v for s, v in self._settings().items() if s in owned
        }
        return f"{self.name}({', '.join(f'{setting}={value}' for setting, value in values.items())})"

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("name", "key")}


def _check(name: str, setting: str, value: Any) -> None:
    """Raise ValueError with the remedy. A tensor is read, once, when the mitigation is made."""
    if setting in ("every", "window"):
        fits, remedy = isinstance(value, int) and value >= 1, "must be a whole number of tokens, at least 1"
    else:
        low, high = torch.as_tensor(math.nan if value is None else value).aminmax()
        if setting == "max_norm":
            fits, remedy = bool(low > 0), "must be positive, inf for a head that is never clipped"
        elif setting in ("alpha_scale", "insert_scale"):
            fits, remedy = bool(low > 0 and high <= 1), "must lie in (0, 1]"
        else:
            fits, remedy = bool(low > 0 and high < math.inf), "must be positive and finite"
    if not fits:
        raise ValueError(f"{setting}={value} of {name}: {remedy}")


NONE = Mitigation()

"""Training-free changes of the recurrence, as the scan takes them.

Pointwise, inside the discretisation (`discretize.py`), so they cost nothing beside the scan:

    h_t = alpha_scale * exp(dt'_t * decay_scale * A) * h_{t-1} + insert_scale * dt'_t * x_t B_t^T
    dt'_t = delta_scale * clamp(softplus(dt_t + dt_bias), dt_limit), or 0 where that is below `threshold`

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
    "token_filter": ("threshold",),
}
FACTORS = ("alpha_scale", "insert_scale", "delta_scale", "decay_scale")


@dataclass(frozen=True)
class Mitigation:
    """One mitigation: a name and its settings. Any other name labels a combination of factors.

    Factors, `max_norm` and `threshold` are floats, or tensors (H,) with one value per head. heads: those that
    it applies to, counted from 0; None for all. Tokens are counted from the start of the row or document.
    Below, alpha_t = exp(dt_t A) is the retention and w_t = dt_t the insertion weight without a mitigation.

    forget_more (alpha_scale, insert_scale): h_t = alpha_scale alpha_t h_{t-1} + insert_scale w_t x_t B_t^T
        Source: "forget more and remember less", arXiv 2410.07145 section 3.2.
        Cost: none. Every head remembers about 1 / (1 - alpha_scale) tokens at most.
        Cannot tell important tokens from filler: recall of far needles falls with it, and a low insert_scale
        weakens near ones too.
    delta_scale: dt_t := delta_scale dt_t, in decay and insertion
        Source: the constant scaling that arXiv 2410.07145 compares with; per layer, MambaExtend (ICLR 2025).
        Cost: none. Below 1 it stretches time.
        Cannot create forgetting: what enters and what fades shrink together, and near tokens fade in too.
    decay_scale: alpha_t := exp(dt_t decay_scale A)
        Source: Mamba Modulation, arXiv 2509.19633. Cost: none.
        Above 1 every head forgets faster in proportion to its own rate. Cannot reach a head whose retention
        is exactly 1, and hastens heads that forget too fast as it does those that forget too slowly.
    state_norm (max_norm, every): h_t := h_t min(1, max_norm / |h_t|) after every k = `every` tokens, |.| the
        Frobenius norm of a head's P x N state; inf: never. y_t reads the whole state unless k = 1.
        Source: "state normalization", arXiv 2410.07145 section 3.2, where k = 1.
        Cost: serial in time, one scan for every k tokens. Cannot choose what it shrinks: old and new tokens
        lose alike, and norms of heads lose their ratios.
    sliding_window (window): h_t = sum over i in (t - r, t] of alpha_{i+1} ... alpha_t w_i x_i B_i^T,
        r = `window`, within t's document
        Source: "sliding window by state difference", arXiv 2410.07145 section 3.2; here no states are
        subtracted. Cost: two scans, and r tokens for a single one; its state is a `Window` of r - 1 tokens.
        Cannot see anything older than r tokens, whatever its worth.
    hard_reset (every): h_{t-1} := 0 before every r-th token, r = `every`
        Source: the control, of no paper. Cost: none. Cannot keep anything over a reset: right after one even
        the nearest tokens are gone.
    token_filter (threshold): alpha_t := 1 and w_t := 0 where dt_t < threshold; the head's state stays as it
        is, bit for bit, and y_t reads it. Nothing else notices: token counts and other heads go on.
        Source: LongMamba, arXiv 2504.16053, for heads that remember the whole training length.
        Cost: none (a GPU discretises outside its kernel). Cannot forget: it stretches a memory over more
        tokens by losing those of small dt, and mends nothing where a state is over-full. Thresholds have no
        gradient.
    """

    name: str = "none"
    alpha_scale: float | Tensor = 1.0
    insert_scale: float | Tensor = 1.0
    delta_scale: float | Tensor = 1.0
    decay_scale: float | Tensor = 1.0
    max_norm: float | Tensor | None = None
    every: int | None = None
    window: int | None = None
    threshold: float | Tensor | None = None
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.heads is not None:
            _check_heads(self.name, self.heads)
            object.__setattr__(self, "heads", tuple(sorted(self.heads)))
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
        """Whether it is built of several scans rather than changes inside one."""
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
        if self.heads is not None:
            values["heads"] = self.heads
        return f"{self.name}({', '.join(f'{setting}={value}' for setting, value in values.items())})"

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("name", "heads", "key")}


def _check_heads(name: str, heads: tuple[int, ...]) -> None:
    if name == "none":
        raise ValueError(f"heads={heads}: not a setting of none; choose a mitigation")
    whole = all(isinstance(head, int) and head >= 0 for head in heads)
    if not (heads and whole and len(set(heads)) == len(heads)):
        raise ValueError(f"heads={heads} of {name}: name at least one head, from 0, each once")


def _check(name: str, setting: str, value: Any) -> None:
    """Raise ValueError with the remedy. A tensor is read, once, when the mitigation is made."""
    if setting in ("every", "window"):
        fits, remedy = isinstance(value, int) and value >= 1, "must be a whole number of tokens, at least 1"
    else:
        low, high = torch.as_tensor(math.nan if value is None else value).aminmax()
        if setting == "threshold":
            fits, remedy = bool(low >= 0 and high < math.inf), "must be finite and not negative"
        elif setting == "max_norm":
            fits, remedy = bool(low > 0), "must be positive, inf for a head that is never clipped"
        elif setting in ("alpha_scale", "insert_scale"):
            fits, remedy = bool(low > 0 and high <= 1), "must lie in (0, 1]"
        else:
            fits, remedy = bool(low > 0 and high < math.inf), "must be positive and finite"
    if not fits:
        raise ValueError(f"{setting}={value} of {name}: {remedy}")


NONE = Mitigation()

"""Settings of the state in which training rows begin (lightning_modules/initial_state.py)."""

import math
from dataclasses import dataclass
from typing import Literal

from conf.fields import option, require, require_at_least


@dataclass(kw_only=True)
class InitialStateConfig:
    """The state in which training rows begin (lightning_modules/initial_state.py)."""

    name: Literal["zero", "noise", "fitted_noise", "passed", "carried"] = option(
        "zero",
        "zero; noise: N(0, std^2); fitted_noise: N of each head's final states; passed: another row's final "
        "state of the last batch; carried: the row's own, on consecutive data (truncated BPTT)",
    )
    reset_probability: float = option(0.0, "chance that a row begins at zero all the same, at every step")
    std: float | None = option(None, "noise: standard deviation of every element of every state")
    bptt_segments: int = option(
        1, "carried: segments of train_length that the gradient runs back through, the present one included"
    )

    def __post_init__(self) -> None:
        p, std, segments = self.reset_probability, self.std, self.bptt_segments
        require(0 <= p <= 1, "initial_state.reset_probability", p, "must lie in [0, 1]")
        require_at_least("initial_state", self, 1, "bptt_segments")
        remedy = "belongs to carried; set initial_state.name=carried or leave it out"
        require(segments == 1 or self.name == "carried", "initial_state.bptt_segments", segments, remedy)
        remedy = "belongs to noise; set initial_state.name=noise or leave it out"
        require(std is None or self.name == "noise", "initial_state.std", std, remedy)
        if self.name == "noise":
            remedy = "noise needs it, positive and finite, e.g. 0.1 (final states' RMS is a good measure)"
            require(std is not None and 0 < std < math.inf, "initial_state.std", std, remedy)

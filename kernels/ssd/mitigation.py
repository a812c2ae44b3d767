"""Training-free changes of the recurrence, as factors inside the scan.

    h_t = alpha_scale * exp(dt'_t * decay_scale * A) * h_{t-1} + insert_scale * dt'_t * x_t B_t^T
    dt'_t = delta_scale * clamp(softplus(dt_t + dt_bias), dt_limit)

`D x_t` is never scaled. All factors are pointwise in the token, so they cost nothing beside the scan and
every parallel form of it stays exact.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Mitigation:
    """One mitigation. Each factor is a float, or a tensor (H,) with one value per head.

    forget_more (alpha_scale, insert_scale): "forget more and remember less", arXiv 2410.07145 section 3.2.
        Bounds the memory of every head to about 1 / (1 - alpha_scale) tokens. Cannot tell important tokens
        from filler: recall of far needles falls with it, and a low insert_scale weakens near ones too.
    delta_scale: constant scaling of dt, both decay and insertion ("LongMamba" of that paper's comparison;
        arXiv 2504.16053 refines it). Below 1 it stretches time; it cannot create forgetting.
    decay_scale: A scaled (Mamba Modulation, arXiv 2509.19633). Above 1 every head forgets faster in
        proportion to its own rate; a head with retention exactly 1 stays at 1.
    """

    name: str = "none"
    alpha_scale: float | Tensor = 1.0
    insert_scale: float | Tensor = 1.0
    delta_scale: float | Tensor = 1.0
    decay_scale: float | Tensor = 1.0

    @property
    def key(self) -> str:
        """What a recurrent state remembers of the mitigation that made it; equal keys may share a state."""
        factors = (self.alpha_scale, self.insert_scale, self.delta_scale, self.decay_scale)
        shown = [f.tolist() if isinstance(f, Tensor) else f for f in factors]
        return self.name if self.name == "none" else f"{self.name}{shown}"


NONE = Mitigation()

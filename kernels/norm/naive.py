"""The oracle: the formula as written, in float64."""

from torch import Tensor


def naive_gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, *, eps: float, n_groups: int = 1, norm_before_gate: bool = False
) -> Tensor:
    """As `kernels.norm.gated_rms_norm`; gradients by autograd."""
    x64, gate, scale = x.double(), z.double() * z.double().sigmoid(), weight.double()

    def normalise(u: Tensor) -> Tensor:
        grouped = u.unflatten(-1, (n_groups, -1))
        return (grouped / (grouped.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * scale

    return (normalise(x64) * gate if norm_before_gate else normalise(x64 * gate)).to(x.dtype)

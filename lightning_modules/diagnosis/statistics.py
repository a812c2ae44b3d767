"""Numbers of recurrent states, by head."""

import torch
from torch import Tensor

# Of a head's P x N state, means over rows: its entries' mean and variance, root mean square and largest
# magnitude (the largest over rows), and the share of the variance in its top channels.
STATE_MEASURES = ("mean", "variance", "rms", "maximum", "top_share")


def state_measures(states: Tensor, top_share: float) -> tuple[Tensor, Tensor]:
    """The STATE_MEASURES of states (B, n, H, P, N) fp32, and the energy of their channels.

    A channel is one entry (p, n) of the state; its energy is its squared deviation from the mean of its
    head's state, averaged over rows. top_share: the share of channels that count as the top ones, at least
    one; a state whose variance is spread evenly has just this share of it there.

    Returns:
        measures (5, n, H), energy (n, H, P, N).
    """
    low, high = states.flatten(3).aminmax(dim=3)
    mean = states.mean((3, 4), keepdim=True)
    deviation = (states - mean).square_()
    mean = mean[..., 0, 0]
    rms = (deviation.mean((3, 4)) + mean.square()).sqrt_()
    energy = deviation[0] if len(deviation) == 1 else deviation.mean(0)
    channels = energy.flatten(2)
    total = channels.sum(2)
    top = channels.topk(max(1, round(top_share * channels.shape[2])), dim=2, sorted=False).values.sum(2)
    share = torch.where(total == 0, 0.0, top / total)
    maximum = torch.maximum(high, -low).amax(0)
    return torch.stack([mean.mean(0), total / channels.shape[2], rms.mean(0), maximum, share]), energy

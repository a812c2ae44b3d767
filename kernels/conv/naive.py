"""The oracle: one token at a time, in float64, through the state that a decoder would carry."""

import torch
from torch import Tensor


def naive_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
    activation: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `kernels.conv.causal_conv1d`; gradients by autograd. Serial on purpose."""
    batch, length, channels = x.shape
    width = weight.shape[1]
    state = (
        x.new_zeros(batch, channels, width - 1).double() if initial_state is None else initial_state.double()
    )
    outputs = []
    for t in range(length):
        if document_starts is not None:
            state = state.masked_fill(document_starts[:, t, None, None], 0.0)
        window = torch.cat([state, x[:, t, :, None].double()], dim=2)
        y = (window * weight.double()).sum(2)
        y = y if bias is None else y + bias.double()
        outputs.append(y * y.sigmoid() if activation else y)
        state = window[:, :, 1:]
    return torch.stack(outputs, dim=1).to(x.dtype), state.to(x.dtype)

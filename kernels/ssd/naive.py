"""The oracle: the recurrence as written, one token at a time, in float64. Serial on purpose; O(T) steps."""

import torch
from torch import Tensor


def naive_scan(
    x: Tensor,
    log_decay: Tensor,
    insert: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    document_starts: Tensor | None,
    chunk_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """Arguments as `kernels.ssd.chunked.chunked_scan`; gradients by autograd. `chunk_size` plays no part."""
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    x64, B64, C64 = x.double(), B.double(), C.double()
    B64, C64 = (m.repeat_interleave(heads // groups, dim=2) for m in (B64, C64))
    decay = log_decay.double().exp()
    h = x64.new_zeros(batch, heads, headdim, d_state) if initial_state is None else initial_state.double()
    outputs = []
    for t in range(length):
        if document_starts is not None:
            h = h.masked_fill(document_starts[:, t, None, None, None], 0.0)
        inserted = (insert[:, t, :, None] * x64[:, t])[..., None] * B64[:, t, :, None, :]
        h = decay[:, t, :, None, None] * h + inserted
        outputs.append((h * C64[:, t, :, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + x64 * (D.double() if D.dim() == 2 else D.double()[:, None])
    state_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return y.to(x.dtype), h.to(state_dtype)

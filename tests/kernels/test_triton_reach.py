"""The decays of a sliding window against their definition in float64, and their gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.ssd.triton_reach import scaled_ahead, window_decays, window_decays_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(2, 150, 3, 40), (1, 256, 2, 64), (1, 400, 1, 180), (2, 33, 1, 2)]  # batch, length, heads, window
CHUNK = 16


def chunk_sums(log_decay: Tensor) -> Tensor:
    """(B, H, T) fp32, of chunks, in base 2."""
    chunks = torch.cat([part.double().cumsum(1) for part in log_decay.split(CHUNK, 1)], 1)
    return (chunks.transpose(1, 2) / math.log(2)).float().contiguous()


def defined(log_decay: Tensor, documents: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """keeps and reaches (B, H, T), token by token."""
    batch, length, heads = log_decay.shape
    keeps, reaches = (log_decay.new_zeros(batch, heads, length, dtype=torch.float64) for _ in range(2))
    a = log_decay.double()
    for t in range(length):
        start = t // window * window
        stop = start + window
        if stop < length and t > start:
            same = documents[:, t] == documents[:, stop - 1]
            keeps[:, :, t] = a[:, t + 1 : stop].sum(1).exp() * same[:, None]
        if start > 0 and t < stop - 1:
            same = documents[:, t] == documents[:, start - 1]
            reaches[:, :, t] = a[:, start : t + 1].sum(1).exp() * same[:, None]
    return keeps, reaches


@pytest.mark.parametrize(("batch", "length", "heads", "window"), SIZES)
@pytest.mark.parametrize("with_documents", [False, True])
def test_keeps_and_reaches(
    batch: int, length: int, heads: int, window: int, with_documents: bool, check_close: Any
) -> None:
    log_decay = -0.1 * torch.rand(batch, length, heads, device=DEVICE)
    sums = chunk_sums(log_decay)
    starts = torch.rand(batch, length, device=DEVICE) < 0.02
    documents = (starts if with_documents else starts & False).int().cumsum(1, dtype=torch.int32)
    actual = window_decays(sums, documents if with_documents else None, window, CHUNK)
    for name, a, e in zip(("keeps", "reaches"), actual, defined(log_decay, documents, window), strict=True):
        check_close(a, e, 2e-6, name)


@pytest.mark.parametrize(("batch", "length", "heads", "window"), SIZES)
def test_gradients(batch: int, length: int, heads: int, window: int, check_close: Any) -> None:
    log_decay = (-0.1 * torch.rand(batch, length, heads, device=DEVICE, dtype=torch.float64)).requires_grad_()
    insert = torch.rand(batch, length, heads, device=DEVICE, dtype=torch.float64, requires_grad=True)
    documents = (torch.rand(batch, length, device=DEVICE) < 0.02).int().cumsum(1, dtype=torch.int32)
    keeps, reaches = defined(log_decay, documents, window)
    weights = keeps * insert.transpose(1, 2)
    dweights, dreaches = torch.randn_like(keeps), torch.randn_like(keeps)
    expected = torch.autograd.grad(
        [weights, reaches], [log_decay, insert], [dweights, dreaches], materialize_grads=True
    )
    # where the kernels leave it: at the first of a target's sources, less what goes to their weight
    shift = window - 1
    dscales = torch.zeros_like(keeps)
    dscales[:, :, : length - shift] = (dreaches * reaches)[:, :, shift:]
    dscales -= weights * dweights
    dinserts = torch.ones(batch, heads, length, device=DEVICE)  # added to
    given = (keeps, insert.transpose(1, 2), dscales, dweights)
    floats = (t.detach().float().contiguous() for t in given)
    dlog_decays = window_decays_backward(*floats, dinserts, window)
    check_close(dlog_decays.transpose(1, 2), expected[0], 1e-5, "log_decay")
    check_close(dinserts.transpose(1, 2) - 1, expected[1], 1e-5, "insert")


def test_scaled_ahead(check_close: Any) -> None:
    dy = torch.randn(2, 70, 3, 8, device=DEVICE)[..., :5]
    reaches = torch.rand(2, 3, 70, device=DEVICE)
    out = scaled_ahead(dy, reaches, 20)
    scaled = dy * reaches.transpose(1, 2)[..., None]
    check_close(out[:, :50], scaled[:, 20:], 1e-6)
    assert not out[:, 50:].any()

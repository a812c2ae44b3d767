# mypy: disable-error-code="no-untyped-def"
"""Which tokens a program works on: rows of a batch, or sequences packed in one row (`cu_seqlens`).

A row is cut into chunks of Q tokens from its own first token. A slot is one chunk in a buffer of chunk
states: row by row, for regular rows those of the chunks [first, first + chunks) of every row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Packing(NamedTuple):
    """Where packed sequences lie, all on the device: made without asking the device for a value."""

    cu_seqlens: Tensor  # (S + 1,) int64
    first_slot: Tensor  # (S + 1,) int64: the slot of each sequence's first chunk
    slots: Tensor  # (2, T // Q + S) int64: a slot's first token, its sequence's end; equal if unused

    @classmethod
    def of(cls, cu_seqlens: Tensor, length: int, chunk: int) -> "Packing":
        cu = cu_seqlens.to(torch.int64)
        counts = (cu.diff() + chunk - 1) // chunk
        first_slot = torch.cat([cu.new_zeros(1), counts.cumsum(0)])
        slot = torch.arange(length // chunk + len(counts), device=cu.device)
        row = torch.searchsorted(first_slot[1:], slot, right=True).clamp(max=len(counts) - 1)
        start = cu[row] + (slot - first_slot[row]) * chunk
        end = cu[row + 1]
        return cls(cu, first_slot, torch.stack([torch.minimum(start, end), end]))


@triton.jit
def token_range(row, cu_seqlens, T, VARLEN: tl.constexpr):
    """(batch, first token, end) of a row, int64."""
    if VARLEN:
        return row * 0, tl.load(cu_seqlens + row), tl.load(cu_seqlens + row + 1)
    else:
        return row, row * 0, row * 0 + T


@triton.jit
def chunk_of(slot, slots, T, first, chunks, n_slots, Q: tl.constexpr, VARLEN: tl.constexpr):
    """(batch, first token, end of the row) of a slot, int64."""
    slot = slot.to(tl.int64)
    if VARLEN:
        return slot * 0, tl.load(slots + slot), tl.load(slots + n_slots + slot)
    else:
        return slot // chunks, (first + slot % chunks) * Q, slot * 0 + T


@triton.jit
def document_before(documents, row_start, t):
    """Documents begun before token t of a row that starts at `row_start` in `documents`."""
    return tl.load(documents + row_start + t - 1, mask=t > 0, other=0)

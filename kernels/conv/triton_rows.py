"""Which tokens a program of the convolution works on: segments of a batch's rows or of packed sequences.

A row is one sequence, with one state. It is cut into segments of SIZE tokens from its own first token, so
that only its first segment reads or differentiates the state before it.
"""

# mypy: allow-incomplete-defs
import torch
import triton
import triton.language as tl
from torch import Tensor


def segment_table(cu_seqlens: Tensor, length: int, size: int) -> Tensor:
    """(4, length // size + S) int64, of every segment: row, first token, first and last + 1 of the row.

    Made on the device, without asking it for a value: what is not needed at the end has row -1. Every row,
    an empty one too, has a segment. Borders outside [0, length] are moved there.
    """
    bounds = cu_seqlens.to(torch.int64).clamp(0, length)
    begin, end = bounds[:-1], bounds[1:]
    after = ((end - begin + size - 1) // size).clamp(min=1).cumsum(0)  # segments up to and with each row
    segment = torch.arange(length // size + len(begin), device=bounds.device)
    row = torch.searchsorted(after, segment, right=True)
    used, row = row < len(begin), row.clamp(max=len(begin) - 1)
    place = segment - torch.where(row > 0, after[row - 1], 0)
    start = torch.where(used, begin[row] + place * size, end[row])
    return torch.stack([torch.where(used, row, -1), start, begin[row], end[row]])


@triton.jit
def locate(segment, table, n_segments, per_row, T, SIZE: tl.constexpr, PACKED: tl.constexpr):
    """Of segments (int32): batch, row, first token, row's first and last + 1 (int64); whether it begins."""
    known = segment < n_segments
    if PACKED:
        row = tl.load(table + segment, mask=known, other=-1)
        start = tl.load(table + n_segments + segment, mask=known, other=0)
        begin = tl.load(table + 2 * n_segments + segment, mask=known, other=0)
        end = tl.load(table + 3 * n_segments + segment, mask=known, other=0)
        return row * 0, row, start, begin, end, (start == begin) & (row >= 0)
    else:
        row = (segment // per_row).to(tl.int64)
        start = (segment % per_row).to(tl.int64) * SIZE
        return row, row, start, row * 0, tl.where(known, row * 0 + T, start), (start == 0) & known

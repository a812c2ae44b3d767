"""What several operators ask of their arguments; what does not fit is one clear ValueError."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor


def require_shape(name: str, tensor: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    """The tensor must have one of these shapes."""
    if tuple(tensor.shape) not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {wanted}")


def require_device(name: str, tensor: Tensor, x: Tensor) -> None:
    """The tensor must be where x is."""
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move it")


def sequences(cu_seqlens: Tensor, length: int) -> Iterator[tuple[int, int]]:
    """First token and end of each packed sequence, on the host."""
    borders = cu_seqlens.tolist()
    increasing = all(start < stop for start, stop in itertools.pairwise(borders))
    if borders[0] != 0 or borders[-1] != length or not increasing:
        raise ValueError(
            f"cu_seqlens={borders}: expected sequence borders that increase from 0 to T = {length}"
        )
    return itertools.pairwise(borders)


def products_dtype(t: Tensor) -> torch.dtype:
    """What a matrix product of t is computed in: autocast's dtype, under autocast."""
    device = t.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else t.dtype

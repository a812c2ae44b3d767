"""Checks of the scan's arguments: shapes, dtypes and devices always, values on request."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.ssd.mitigation import Mitigation

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_arguments(
    tensors: dict[str, Any],
    mitigation: Mitigation,
    dt_limit: tuple[float, float] | None,
    states_every: int | None,
    chunk_size: int,
    backend: str,
) -> None:
    """Raise ValueError for the first argument that does not fit, with its name, value and what would fit.

    Args:
        tensors: the tensor arguments of `ssd_scan` by name, some None.
    """
    if backend not in ("naive", "chunked", "triton"):
        raise ValueError(f"backend={backend!r}: choose 'naive', 'chunked' or 'triton'")
    x, B = tensors["x"], tensors["B"]
    if x.dim() != 4 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (B, T, H, P) with T >= 1")
    if B.dim() != 4:
        raise ValueError(f"B has shape {tuple(B.shape)}: expected (B, T, G, N)")
    if x.shape[2] % B.shape[2]:
        raise ValueError(f"B has {B.shape[2]} groups: must divide the {x.shape[2]} heads of x")
    cu_seqlens = tensors["cu_seqlens"]
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
            raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}: expected (S + 1,) with S >= 1")
        if len(x) != 1:
            raise ValueError(f"x has {len(x)} rows: cu_seqlens packs sequences into one row")
    _check_dtypes(tensors, backend)
    _check_shapes(tensors, mitigation)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move it")
    if dt_limit is not None and not 0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit={dt_limit}: must be (low, high) with 0 <= low <= high")
    if states_every is not None and states_every < 1:
        raise ValueError(f"states_every={states_every}: must be at least 1")
    if chunk_size < 16 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size={chunk_size}: must be a power of two of at least 16")


def _check_dtypes(tensors: dict[str, Any], backend: str) -> None:
    x = tensors["x"]
    inputs = FLOATS if backend == "naive" else FLOATS[:3]
    states = (torch.float32, torch.float64) if backend == "naive" else FLOATS[:1]
    whole = (torch.int64, torch.int32)
    allowed = {"x": inputs, "B": (x.dtype,), "C": (x.dtype,), "initial_state": states}
    allowed |= {"document_starts": (torch.bool,), "cu_seqlens": whole, "position": whole}
    for name, tensor in tensors.items():
        dtypes = allowed.get(name, FLOATS)
        if tensor is not None and tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            given = str(tensor.dtype).removeprefix("torch.")
            why = ", x's dtype" if name in ("B", "C") else ""
            raise ValueError(f"{name} has dtype {given}: expected {wanted}{why}")


def _check_shapes(tensors: dict[str, Any], mitigation: Mitigation) -> None:
    batch, length, heads, headdim = tensors["x"].shape
    groups, d_state = tensors["B"].shape[2:]
    rows = batch if tensors["cu_seqlens"] is None else len(tensors["cu_seqlens"]) - 1
    expected: dict[str, tuple[tuple[int, ...], ...]] = {
        "dt": ((batch, length, heads),),
        "A": ((heads,),),
        "B": ((batch, length, groups, d_state),),
        "C": ((batch, length, groups, d_state),),
        "D": ((heads,), (heads, headdim)),
        "dt_bias": ((heads,),),
        "initial_state": ((rows, heads, headdim, d_state),),
        "document_starts": ((batch, length),),
        "position": ((rows,),),
    }
    for name, shapes in expected.items():
        tensor = tensors[name]
        if tensor is not None and tuple(tensor.shape) not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {wanted}")


def check_values(tensors: dict[str, Any], dt_softplus: bool) -> None:
    """What only the values can tell. Reads every tensor: on a GPU it waits for the device."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity: expected finite numbers")
    dt, A = tensors["dt"], tensors["A"]
    if not dt_softplus and (dt < 0).any():
        raise ValueError(f"dt holds {dt.min():g}: expected dt >= 0; set dt_softplus=True for raw dt")
    if (A >= 0).any():
        raise ValueError(f"A holds {A.max():g}: expected A < 0, such as -exp(A_log)")
    if tensors["position"] is not None and (tensors["position"] < 0).any():
        raise ValueError(f"position holds {tensors['position'].min()}: expected token counts, >= 0")
    if tensors["cu_seqlens"] is not None:
        list(sequences(tensors["cu_seqlens"], tensors["x"].shape[1]))


def sequences(cu_seqlens: Tensor, length: int) -> Iterator[tuple[int, int]]:
    """First token and end of each packed sequence, on the host."""
    borders = cu_seqlens.tolist()
    increasing = all(start < stop for start, stop in itertools.pairwise(borders))
    if borders[0] != 0 or borders[-1] != length or not increasing:
        raise ValueError(
            f"cu_seqlens={borders}: expected sequence borders that increase from 0 to T = {length}"
        )
    return itertools.pairwise(borders)

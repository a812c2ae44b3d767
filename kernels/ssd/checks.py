"""Checks of the scan's arguments: shapes, dtypes and devices always, values on request."""

from typing import Any

import torch
from torch import Tensor

from kernels.arguments import require_device, require_shape, sequences
from kernels.ssd.heads import groups_of
from kernels.ssd.mitigation import Mitigation
from kernels.ssd.window import Window

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def named_tensors(arguments: dict[str, Any], mitigation: Mitigation) -> dict[str, Tensor]:
    """The tensors among the arguments, those inside a window and a mitigation included, by name."""
    state = arguments["initial_state"]
    if state is not None and isinstance(state, Window) != (mitigation.window is not None):
        wanted = "a Window" if mitigation.window is not None else "a tensor"
        raise ValueError(
            f"initial_state is a {type(state).__name__}: {mitigation.name} continues from {wanted}, "
            "the state that an earlier call under it returned"
        )
    if isinstance(state, Window):
        inside = {f"initial_state.{name}": tensor for name, tensor in state._asdict().items()}
        arguments = {name: value for name, value in arguments.items() if name != "initial_state"} | inside
    arguments = arguments | {f"mitigation.{name}": value for name, value in vars(mitigation).items()}
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


def check_arguments(
    tensors: dict[str, Tensor],
    mitigation: Mitigation,
    dt_limit: tuple[float, float] | None,
    states_every: int | None,
    chunk_size: int,
    backend: str,
) -> None:
    """Raise ValueError for the first argument that does not fit, with its name, value and what would fit."""
    if backend not in ("naive", "chunked", "triton"):
        raise ValueError(f"backend={backend!r}: choose 'naive', 'chunked' or 'triton'")
    x, B = tensors["x"], tensors["B"]
    if x.dim() != 4 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (B, T, H, P) with T >= 1")
    if B.dim() != 4:
        raise ValueError(f"B has shape {tuple(B.shape)}: expected (B, T, G, N)")
    if x.shape[2] % B.shape[2]:
        raise ValueError(f"B has {B.shape[2]} groups: must divide the {x.shape[2]} heads of x")
    require_heads(mitigation, x.shape[2])
    if "cu_seqlens" in tensors:
        shape = tuple(tensors["cu_seqlens"].shape)
        if len(shape) != 1 or shape[0] < 2:
            raise ValueError(f"cu_seqlens has shape {shape}: expected (S + 1,) with S >= 1")
        if len(x) != 1:
            raise ValueError(f"x has {len(x)} rows: cu_seqlens packs sequences into one row")
    _check_dtypes(tensors, backend)
    _check_shapes(tensors, mitigation)
    for name, tensor in tensors.items():
        require_device(name, tensor, x)
    if dt_limit is not None and not 0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit={dt_limit}: must be (low, high) with 0 <= low <= high")
    if states_every is not None and states_every < 1:
        raise ValueError(f"states_every={states_every}: must be at least 1")
    if chunk_size < 16 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size={chunk_size}: must be a power of two of at least 16")


def require_heads(mitigation: Mitigation, count: int) -> None:
    """Raise ValueError unless the mitigation's heads are among `count`."""
    unknown = [head for head in mitigation.heads or () if head >= count]
    if unknown:
        raise ValueError(f"mitigation.heads names {unknown}: the heads are 0 to {count - 1}")


def _check_dtypes(tensors: dict[str, Tensor], backend: str) -> None:
    x = tensors["x"]
    like_x, whole = (x.dtype,), (torch.int64, torch.int32)
    states = (torch.float32, torch.float64) if backend == "naive" else FLOATS[:1]
    allowed = {
        "x": FLOATS if backend == "naive" else FLOATS[:3],
        "B": like_x,
        "C": like_x,
        "initial_state": states,
        "initial_state.x": like_x,
        "initial_state.log_decay": states,
        "initial_state.insert": states,
        "initial_state.B": like_x,
        "initial_state.rest": states,
        "document_starts": (torch.bool,),
        "cu_seqlens": whole,
        "position": whole,
    }
    for name, tensor in tensors.items():
        dtypes = allowed.get(name, FLOATS)
        if tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            given = str(tensor.dtype).removeprefix("torch.")
            why = ", x's dtype" if dtypes is like_x else ""
            raise ValueError(f"{name} has dtype {given}: expected {wanted}{why}")


def _check_shapes(tensors: dict[str, Tensor], mitigation: Mitigation) -> None:
    batch, length, heads, headdim = tensors["x"].shape
    groups, d_state = tensors["B"].shape[2:]
    rows = len(tensors["cu_seqlens"]) - 1 if "cu_seqlens" in tensors else batch
    past, chosen = (mitigation.window or 1) - 1, mitigation.heads or tuple(range(heads))
    expected: dict[str, tuple[tuple[int, ...], ...]] = {
        "dt": ((batch, length, heads),),
        "A": ((heads,),),
        "B": ((batch, length, groups, d_state),),
        "C": ((batch, length, groups, d_state),),
        "D": ((heads,), (heads, headdim)),
        "dt_bias": ((heads,),),
        "initial_state": ((rows, heads, headdim, d_state),),
        "initial_state.x": ((rows, past, len(chosen), headdim),),
        "initial_state.log_decay": ((rows, past, len(chosen)),),
        "initial_state.insert": ((rows, past, len(chosen)),),
        "initial_state.B": ((rows, past, len(groups_of(chosen, heads, groups)), d_state),),
        "initial_state.rest": ((rows, heads - len(chosen), headdim, d_state),),
        "document_starts": ((batch, length),),
        "position": ((rows,),),
    }
    for name, tensor in tensors.items():
        shapes = ((heads,), ()) if name.startswith("mitigation.") else expected.get(name)
        if shapes is not None:
            require_shape(name, tensor, shapes)


def check_values(tensors: dict[str, Tensor], dt_softplus: bool) -> None:
    """What only the values can tell. Reads every tensor: on a GPU it waits for the device."""
    for name, tensor in tensors.items():
        if not name.startswith("mitigation.") and not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity: expected finite numbers")
    dt, A = tensors["dt"], tensors["A"]
    if not dt_softplus and (dt < 0).any():
        raise ValueError(f"dt holds {dt.min():g}: expected dt >= 0; set dt_softplus=True for raw dt")
    if (A >= 0).any():
        raise ValueError(f"A holds {A.max():g}: expected A < 0, such as -exp(A_log)")
    if "position" in tensors and (tensors["position"] < 0).any():
        raise ValueError(f"position holds {tensors['position'].min()}: expected token counts, >= 0")
    if "cu_seqlens" in tensors:
        sequences(tensors["cu_seqlens"], tensors["x"].shape[1])

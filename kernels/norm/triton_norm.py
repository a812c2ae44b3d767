"""RMSNorm on Triton kernels as one differentiable operator, `longstate::rms_norm`, gated or not.

The launches are plain functions: other operators call them inside their own.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from kernels.norm.triton_kernels import norm_backward_kernel, norm_forward_kernel
from kernels.triton_support import on_device
from kernels.tuning import Config, bucket, pick

# TILE: elements of a block, ROWS tokens of a group; a larger group is a block of its own. PROGRAMS: of a
# backward pass, at most, as each leaves a partial sum of dweight: what 132 processors hold at a time.
FORWARD_CONFIGS = (
    Config(num_warps=4, meta={"TILE": 2048}),
    Config(num_warps=8, meta={"TILE": 4096}),
    Config(num_warps=2, meta={"TILE": 1024}),
)
BACKWARD_CONFIGS = (
    Config(num_warps=8, meta={"TILE": 2048, "PROGRAMS": 396, "maxnreg": 80}),
    Config(num_warps=4, meta={"TILE": 2048, "PROGRAMS": 1584}),
    Config(num_warps=8, meta={"TILE": 4096, "PROGRAMS": 264, "maxnreg": 128}),
)
ELEMENTS_PER_WARP = 512  # of a group larger than TILE


def triton_rms_norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    n_groups: int,
    norm_before_gate: bool,
    dtype: torch.dtype,
) -> Tensor:
    """As `kernels.norm.gated_rms_norm`, and with z None as `kernels.norm.rms_norm`; the result in `dtype`."""
    require_dtypes(x=x.dtype, z=x.dtype if z is None else z.dtype, dtype=dtype)
    return _forward(x, z, weight, eps, n_groups, norm_before_gate, dtype)[0]


def launch_forward(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    n_groups: int,
    norm_before_gate: bool,
    dtype: torch.dtype,
    branch: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y in `dtype`, and the inverse root mean square of every token and group (..., n_groups) fp32.

    branch: is added to x first; the sum is written to `total`, contiguous.
    """
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    inverse = x.new_empty(*x.shape[:-1], n_groups, dtype=torch.float32)
    flat, gate, added = _rows(x), _rows_if(z), _rows_if(branch)
    settings, size = _settings("norm_forward", FORWARD_CONFIGS, flat, n_groups), x.shape[-1] // n_groups
    with on_device(x):
        norm_forward_kernel[(triton.cdiv(len(flat), settings["ROWS"]) * n_groups,)](
            flat, gate, weight.contiguous(), added, total, y, inverse,
            flat.stride(0), _stride(gate), _stride(added), eps, len(flat), n_groups, size,
            GATE=_gate(z, norm_before_gate), ADD=branch is not None, **settings,
        )  # fmt: skip
    return y, inverse


def launch_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    inverse: Tensor,
    n_groups: int,
    norm_before_gate: bool,
    dz: Tensor | None = None,
    y: Tensor | None = None,
    dtotal: Tensor | None = None,
    dbranch: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dz (empty without z), dweight.

    dz: where to write it: (..., C), channels side by side, tokens one stride apart, such as a slice of a
    wider buffer. y: where to write the forward's result again, for a caller that did not keep it:
    contiguous, of the dtype that it had. dtotal: another gradient of x, added to dx; dbranch: where to write
    dx a second time, contiguous, rounded to its dtype.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dz is None:
        dz = _gradient_of_gate(x, z)
    dy, flat, gate, more = _rows(dy), _rows(x), _rows_if(z), _rows_if(dtotal)
    settings, size = _settings("norm_backward", BACKWARD_CONFIGS, flat, n_groups), x.shape[-1] // n_groups
    blocks = triton.cdiv(len(flat), settings["ROWS"])
    turns = max(1, triton.cdiv(blocks, max(1, settings.pop("PROGRAMS") // n_groups)))
    programs = triton.cdiv(blocks, turns)
    partial = x.new_empty(programs, x.shape[-1], dtype=torch.float32)
    with on_device(x):
        norm_backward_kernel[(programs * n_groups,)](
            dy, flat, gate, weight.contiguous(), inverse, more, dx, dz, dbranch, partial, y,
            dy.stride(0), flat.stride(0), _stride(gate), _stride(more),
            0 if gate is None else dz.view(gate.shape).stride(0), len(flat), turns, n_groups, size,
            GATE=_gate(z, norm_before_gate), TOTAL=more is not None, BRANCH=dbranch is not None,
            AGAIN=y is not None, **settings,
        )  # fmt: skip
    return dx, dz, partial.sum(0).to(weight.dtype)


@torch.library.custom_op("longstate::rms_norm", mutates_args=())
def _forward(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    n_groups: int,
    norm_before_gate: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return launch_forward(x, z, weight, eps, n_groups, norm_before_gate, dtype)


@_forward.register_fake
def _(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    n_groups: int,
    norm_before_gate: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    return y, x.new_empty(*x.shape[:-1], n_groups, dtype=torch.float32)


@torch.library.custom_op("longstate::rms_norm_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    inverse: Tensor,
    n_groups: int,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(dy, x, z, weight, inverse, n_groups, norm_before_gate)


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    inverse: Tensor,
    n_groups: int,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, _gradient_of_gate(x, z), torch.empty(weight.shape, dtype=weight.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, z, weight, _, ctx.n_groups, ctx.norm_before_gate, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, z, weight, output[1])


def _gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, z, weight, inverse = ctx.saved_tensors
    dx, dz, dweight = _backward(dy, x, z, weight, inverse, ctx.n_groups, ctx.norm_before_gate)
    return dx, None if z is None else dz, dweight, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def require_dtypes(**given: torch.dtype) -> None:
    for name, dtype in given.items():
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} is {dtype}: the Triton norm takes float32, bfloat16 and float16")


def _settings(kernel: str, configs: tuple[Config, ...], flat: Tensor, n_groups: int) -> dict[str, Any]:
    tokens, channels = flat.shape
    key = {"C": channels, "groups": n_groups, "dtype": str(flat.dtype)[6:]}
    settings = pick(kernel, configs, tokens=bucket(tokens), **key).settings()
    block, tile = triton.next_power_of_2(channels // n_groups), settings.pop("TILE")
    if block > tile:
        settings["num_warps"] = max(settings["num_warps"], min(16, block // ELEMENTS_PER_WARP))
        settings.pop("maxnreg", None)
    return settings | {"ROWS": max(1, tile // block), "BLOCK": block}


def _gate(z: Tensor | None, norm_before_gate: bool) -> int:
    return 0 if z is None else 2 if norm_before_gate else 1


def _rows(t: Tensor) -> Tensor:
    """t (..., C) as (tokens, C) with channels side by side: where it lies if it can be, else a copy."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _rows_if(t: Tensor | None) -> Tensor | None:
    return None if t is None else _rows(t)


def _stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


def _gradient_of_gate(x: Tensor, z: Tensor | None) -> Tensor:
    return x.new_empty(0) if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)

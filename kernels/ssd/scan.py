"""The public function of the SSD scan: checks, discretisation, choice of backend."""

from typing import Literal

import torch
from torch import Tensor

from kernels.ssd.chunked import chunked_scan
from kernels.ssd.discretize import discretize
from kernels.ssd.mitigation import NONE, Mitigation
from kernels.ssd.naive import naive_scan

Backend = Literal["naive", "chunked"]


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
    mitigation: Mitigation | None = None,
    chunk_size: int = 64,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Selective state-space recurrence of Mamba-2 (arXiv 2405.21060, section 6), differentiable throughout.

        h_t = alpha_scale * exp(dt_t A) h_{t-1} + insert_scale * dt_t * x_t B_t^T        y_t = h_t C_t + D x_t

    Args:
        x: (B, T, H, P), fp32 or bf16 (fp64 with backend="naive"). Any T >= 1.
        dt: (B, T, H), time steps after softplus, not negative; before bias and softplus with `dt_softplus`.
        A: (H,), negative.
        B, C: (B, T, G, N), G divides H; x's dtype.
        D: (H,) or (H, P), skip connection; None for none.
        initial_state: (B, H, P, N) fp32, the state before the first token; None for zero.
        document_starts: (B, T) bool; the state is zero before a True token.
        dt_bias: (H,), added to dt. dt_softplus: apply softplus. dt_limit: clamp after softplus.
        mitigation: factors inside the recurrence (`kernels.ssd.Mitigation`).
        chunk_size: power of two, at least 16; speed only.
        backend: "naive" (float64 token by token, the oracle) or "chunked" (default).

    Returns:
        y (B, T, H, P) in x's dtype and the final state (B, H, P, N) fp32 (fp64 for fp64 input).

    Raises:
        ValueError: for shapes that do not fit, naming the argument.
    """
    _check(x, dt, A, B, C, D, initial_state, document_starts, chunk_size)
    scan = {"naive": naive_scan, "chunked": chunked_scan}.get(backend or "chunked")
    if scan is None:
        raise ValueError(f"backend={backend!r}: choose 'naive' or 'chunked'")
    compute = torch.float64 if backend == "naive" else torch.float32
    log_decay, insert = discretize(dt, A.to(compute), dt_bias, dt_softplus, dt_limit, mitigation or NONE)
    return scan(x, log_decay, insert, B, C, D, initial_state, document_starts, chunk_size)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    document_starts: Tensor | None,
    chunk_size: int,
) -> None:
    if x.dim() != 4 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (B, T, H, P) with T >= 1")
    if B.dim() != 4:
        raise ValueError(f"B has shape {tuple(B.shape)}: expected (B, T, G, N)")
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    if heads % groups:
        raise ValueError(f"B has {groups} groups: must divide the {heads} heads of x")
    expected: dict[str, tuple[Tensor | None, tuple[tuple[int, ...], ...]]] = {
        "dt": (dt, ((batch, length, heads),)),
        "A": (A, ((heads,),)),
        "B": (B, ((batch, length, groups, d_state),)),
        "C": (C, ((batch, length, groups, d_state),)),
        "D": (D, ((heads,), (heads, headdim))),
        "initial_state": (initial_state, ((batch, heads, headdim, d_state),)),
        "document_starts": (document_starts, ((batch, length),)),
    }
    for name, (tensor, shapes) in expected.items():
        if tensor is not None and tuple(tensor.shape) not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {wanted}")
    if B.dtype != x.dtype or C.dtype != x.dtype:
        raise ValueError(f"B is {B.dtype} and C is {C.dtype}: expected x's dtype, {x.dtype}")
    if chunk_size < 16 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size={chunk_size}: must be a power of two of at least 16")

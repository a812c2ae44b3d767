"""The public function of the SSD scan: checks, packed sequences, discretisation, choice of backend."""

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.arguments import sequences
from kernels.ssd.checks import check_arguments, check_values, named_tensors
from kernels.ssd.chunked import chunked_scan
from kernels.ssd.core import Tokens, span_of
from kernels.ssd.discretize import discretize, per_head_factors
from kernels.ssd.heads import Scan, by_heads, spread
from kernels.ssd.mitigation import NONE, Mitigation
from kernels.ssd.naive import oracle
from kernels.ssd.operators import composed_scan
from kernels.ssd.window import State, Window, last_window, map_state

Backend = Literal["naive", "chunked", "triton"]


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: State | None = None,
    document_starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
    mitigation: Mitigation | None = None,
    position: Tensor | None = None,
    states_every: int | None = None,
    chunk_size: int = 64,
    backend: Backend | None = None,
    validate: bool = False,
) -> tuple[Any, ...]:
    """Selective state-space recurrence of Mamba-2 (arXiv 2405.21060, section 6), differentiable throughout.

        h_t = alpha_scale * exp(dt_t A) h_{t-1} + insert_scale * dt_t * x_t B_t^T        y_t = h_t C_t + D x_t

    Args:
        x: (B, T, H, P), fp32, bf16 or fp16 (fp64 with backend="naive"). Any T >= 1.
        dt: (B, T, H), time steps after softplus, not negative; before bias and softplus with `dt_softplus`.
        A: (H,), negative.
        B, C: (B, T, G, N), G divides H; x's dtype.
        D: (H,) or (H, P), skip connection; None for none.
        initial_state: (B, H, P, N) fp32, the state before the first token; None for zero. Under
            sliding_window the `Window` before it.
        document_starts: (B, T) bool; the state is zero before a True token.
        cu_seqlens: (S + 1,) int32 or int64, borders of sequences packed into one row (B = 1), from 0 to T.
            States, `position` and the window then have S rows, one a sequence.
        dt_bias: (H,), added to dt. dt_softplus: apply softplus. dt_limit: clamp after softplus.
        mitigation: a change of the recurrence, of all heads or some (`kernels.ssd.Mitigation`).
        position: (B,) int64, tokens since the row's document began before this call; None for 0. Only
            mitigations that count tokens read it.
        states_every: k >= 1: also return the states after every k tokens of a row or packed sequence.
        chunk_size: power of two, at least 16; speed only.
        backend: "naive" (float64 token by token, the oracle), "chunked" (PyTorch) or "triton"; None for
            "triton" on CUDA tensors and "chunked" elsewhere.
        validate: also check values, which reads every tensor (on a GPU it waits for the device).

    Returns:
        y (B, T, H, P) in x's dtype and the final state (B, H, P, N) fp32 (fp64 for fp64 input), under
        sliding_window the next `Window`. With `states_every` also states (B, T // k, H, P, N) fp32; those of
        packed sequences follow each other.

    Raises:
        ValueError: for arguments that do not fit, naming the argument, its value and what would fit.
    """
    mitigation = mitigation or NONE
    backend = backend or ("triton" if x.is_cuda else "chunked")
    arguments: dict[str, Any] = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias}
    arguments |= {"initial_state": initial_state, "position": position}
    arguments |= {"document_starts": document_starts, "cu_seqlens": cu_seqlens}
    tensors = named_tensors(arguments, mitigation)
    check_arguments(tensors, mitigation, dt_limit, states_every, chunk_size, backend)
    if validate:
        check_values(tensors, dt_softplus)

    mitigation = spread(mitigation, x.shape[2], x.device)
    fused = not mitigation.composed and mitigation.threshold is None
    if backend == "triton" and states_every is None and fused:
        from kernels.ssd.triton_scan import triton_fused_scan  # only here: importing this module needs no GPU

        assert not isinstance(initial_state, Window)
        factors = per_head_factors(A, mitigation)
        return triton_fused_scan(
            x, dt, *factors, B, C, D=D, initial_state=initial_state, document_starts=document_starts,
            cu_seqlens=cu_seqlens, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit,
        )  # fmt: skip

    A = A.to(torch.float64 if backend == "naive" else torch.float32)

    def tokens_from(start: int) -> Tokens:
        decays = discretize(dt[:, start:], A, dt_bias, dt_softplus, dt_limit, mitigation)
        return Tokens(x[:, start:], *decays, B[:, start:], C[:, start:])

    own_kernel = mitigation.heads is None and (mitigation.window or mitigation.max_norm is not None)
    if backend == "triton" and states_every is None and cu_seqlens is None and own_kernel:
        from kernels.ssd.triton_mitigations import mitigated_scan
        from kernels.ssd.triton_scan import raw_decay

        decay = raw_decay(dt, per_head_factors(A, mitigation), dt_bias, dt_softplus, dt_limit)
        done = mitigated_scan(x, B, C, D, initial_state, document_starts, position, decay, mitigation)
        if done is not None:
            y, state = done
            if mitigation.window is None:
                return y, state
            start = x.shape[1] - mitigation.window + 1
            recent = span_of(document_starts, start, x.shape[1])
            return y, last_window(tokens_from(start), recent, mitigation.window)

    tokens = tokens_from(0)
    scan = oracle if backend == "naive" else _composed(backend, chunk_size)
    scan = partial(by_heads, scan)
    if cu_seqlens is not None:
        scan = partial(_packed, scan, cu_seqlens)
    results = scan(tokens, D, initial_state, document_starts, position, mitigation, states_every)
    return results if states_every is not None else results[:2]


def _composed(backend: str, chunk_size: int) -> Scan:
    if backend == "chunked":
        return partial(composed_scan, partial(chunked_scan, chunk_size=chunk_size))
    from kernels.ssd.triton_mitigations import windowed_tokens
    from kernels.ssd.triton_scan import triton_scan

    return partial(composed_scan, triton_scan, windowed=windowed_tokens)


def _packed(
    scan: Callable[..., tuple[Tensor, State, Tensor | None]],
    cu_seqlens: Tensor,
    tokens: Tokens,
    D: Tensor | None,
    initial_state: State | None,
    document_starts: Tensor | None,
    position: Tensor | None,
    mitigation: Mitigation,
    states_every: int | None,
) -> tuple[Tensor, State, Tensor | None]:
    """One scan a sequence; the borders are read on the host."""
    results = []
    for row, (start, stop) in enumerate(sequences(cu_seqlens, tokens.length)):
        one = itemgetter(slice(row, row + 1))
        state = None if initial_state is None else map_state(one, initial_state)
        count = None if position is None else one(position)
        starts = span_of(document_starts, start, stop)
        results.append(scan(tokens.span(start, stop), D, state, starts, count, mitigation, states_every))
    outputs, finals, states = zip(*results, strict=True)
    kept = None if states_every is None else torch.cat(states, 1)
    return torch.cat(outputs, 1), map_state(lambda *t: torch.cat(t), *finals), kept

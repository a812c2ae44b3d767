"""The SSD scan on Triton kernels as one differentiable operator, `longstate::ssd_scan`.

    decay_sums       dt -> chunk sums of log decays, insertion weights, (B, H, T) fp32
    scan_forward     everything else, one program a head and row
    scan_backward    a slab of time after another, from the last: states that enter its chunks, gradients
    of those
                     that leave, then all gradients; memory is bounded by the slab, not by T

Where rows x heads leave the GPU idle, time is cut into segments that run side by side: one more pass over
x and B finds what each segment adds to the state (`states_kernel`), then `merge_kernel` what enters it.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels.ssd.triton_backward import chunk_gradient_kernel, group_gradient_kernel
from kernels.ssd.triton_decay import decay_sums_backward_kernel, decay_sums_kernel
from kernels.ssd.triton_forward import scan_forward_kernel
from kernels.ssd.triton_rows import Packing
from kernels.ssd.triton_schedule import (
    LARGEST_STATE,
    chunk_gradient_configs,
    forward_configs,
    group_gradient_configs,
    packed_schedule,
    processors,
    schedule,
    states_configs,
    tile,
)
from kernels.ssd.triton_states import merge_kernel, states_kernel
from kernels.triton_support import on_device
from kernels.tuning import Config, bucket, pick

HEADS_PER_BLOCK, MERGE_BLOCK = 16, 1024
LARGEST = (
    3.0e38  # stands for an absent upper limit of dt: an infinity does not survive torch.compile's source
)


class _Decay(NamedTuple):
    """What retentions and weights come from: dt and numbers per head, or log decays `dt` and weights
    `insert`."""

    dt: Tensor
    rate: Tensor | None
    log_alpha: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    insert: Tensor | None
    softplus: bool
    low: float
    high: float

    @property
    def kinds(self) -> dict[str, bool]:
        return {
            "RAW": self.insert is not None,
            "SOFTPLUS": self.softplus,
            "LIMIT": (self.low, self.high) != (0.0, LARGEST),
            "BIAS": self.bias is not None,
            "WEIGHT": self.weight is not None,
        }


class _Call:
    """Shapes, strides and schedule of one call, and its launches."""

    def __init__(
        self,
        x: Tensor,
        B: Tensor,
        C: Tensor,
        documents: Tensor | None,
        cu_seqlens: Tensor | None,
        segments: int,
    ) -> None:
        self.x, self.B, self.C, self.documents = x, B, C, documents
        self.batch, self.length, self.heads, self.headdim = x.shape
        self.groups, self.d_state = B.shape[2:]
        self.shape = (self.headdim, self.d_state, x.element_size())
        self.packing = None
        if cu_seqlens is None:
            self.rows = self.batch
            sizes = (self.length, self.heads, self.headdim, self.d_state, x.element_size())
            self.plan = schedule(self.rows, *sizes, processors(x.device), segments)
            self.chunks = triton.cdiv(self.length, self.plan.chunk)
        else:
            self.rows = len(cu_seqlens) - 1
            self.plan = packed_schedule(self.length, self.rows, self.headdim, self.d_state, x.element_size())
            self.packing = Packing.of(cu_seqlens, self.length, self.plan.chunk)
            self.chunks = self.plan.slab_chunks
        self.block_p = tile(self.headdim, x.element_size())
        self.block_n = tile(self.d_state, x.element_size())
        self.even = self.headdim == self.block_p and self.d_state == self.block_n

    @property
    def cu_seqlens(self) -> Tensor | None:
        return None if self.packing is None else self.packing.cu_seqlens

    def slots(self, chunks: int) -> int:
        """Chunks in a buffer of `chunks` chunks of every row."""
        return self.rows * chunks if self.packing is None else self.packing.slots.shape[1]

    def state(self, count: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Room for states: (rows, H, P, N), or (count, rows...)."""
        shape = (self.rows, self.heads, self.headdim, self.d_state)
        return self.x.new_empty(shape if count is None else (self.rows, count, *shape[1:]), dtype=dtype)

    def pick(self, kernel: str, configs: tuple[Config, ...]) -> dict[str, Any]:
        """Launch settings."""
        shape = {"P": self.headdim, "N": self.d_state, "G": self.groups, "dtype": str(self.x.dtype)[6:]}
        return pick(kernel, configs, heads=self.rows * self.heads, T=bucket(self.length), **shape).settings()

    def decay_sums(self, decay: "_Decay") -> tuple[Tensor, Tensor]:
        sums = self.x.new_empty(self.batch, self.heads, self.length, dtype=torch.float32)
        inserts = torch.empty_like(sums)
        d, n_slots = decay, self.slots(self.chunks)
        raw = d.insert if d.insert is not None else d.dt
        decay_sums_kernel[(n_slots * triton.cdiv(self.heads, HEADS_PER_BLOCK),)](
            d.dt, d.bias, d.rate, d.log_alpha, d.weight, d.insert, self._slot_table, sums, inserts,
            *d.dt.stride(), *raw.stride(), d.low, d.high, self.length, self.chunks, n_slots, self.heads,
            Q=self.plan.chunk, BLOCK_H=HEADS_PER_BLOCK, ALPHA=d.log_alpha is not None, **d.kinds,
            VARLEN=self.packing is not None,
        )  # fmt: skip
        return sums, inserts

    def decay_sums_backward(
        self, decay: "_Decay", dsums: Tensor, dinserts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ddt, dinsert (empty unless it was given) and the gradients of the per-head numbers (4, H)."""
        d, n_slots = decay, self.slots(self.chunks)
        shape = (self.batch, self.length, self.heads)
        raw = d.insert is not None
        ddt = d.dt.new_empty(shape)
        dinsert = d.dt.new_empty(shape if raw else (0,), dtype=torch.float32)
        partial = self.x.new_empty(
            (0, 4, self.heads) if raw else (n_slots, 4, self.heads), dtype=torch.float32
        )
        decay_sums_backward_kernel[(n_slots * triton.cdiv(self.heads, HEADS_PER_BLOCK),)](
            d.dt, d.bias, d.rate, d.weight, self._slot_table, dsums, dinserts, ddt, dinsert, partial,
            *d.dt.stride(), d.low, d.high, self.length, self.chunks, n_slots, self.heads,
            Q=self.plan.chunk, BLOCK_H=HEADS_PER_BLOCK, **d.kinds, VARLEN=self.packing is not None,
        )  # fmt: skip
        return ddt, dinsert, partial.sum(0)

    def forward(
        self, sums: Tensor, inserts: Tensor, D: Tensor | None, initial: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y, final state, and the states that enter the segments (rows, segments, H, P, N)."""
        x, B, C, plan = self.x, self.B, self.C, self.plan
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        final, borders = self.state(), self.state(plan.segments)
        if plan.parallel:
            self.segment_states(x, B, sums, inserts, borders, initial, backwards=False)
        programs = self.rows * self.heads * triton.cdiv(self.headdim, plan.block_p)
        settings = self.pick("scan_forward", forward_configs(*self.shape))
        for segment in (0,) if plan.parallel else range(plan.segments):
            scan_forward_kernel[(programs * (plan.segments if plan.parallel else 1),)](
                x, B, C, sums, inserts, D, self.documents, initial, borders, self.cu_seqlens, y, final,
                *x.stride()[:3], *B.stride()[:3], *C.stride()[:3],
                self.length, plan.segments, segment, plan.segment_chunks, self.heads, self.headdim,
                self.d_state,
                self.heads // self.groups,
                Q=plan.chunk, BLOCK_P=plan.block_p, BLOCK_N=self.block_n, D_KIND=0 if D is None else D.dim(),
                DOCUMENTS=self.documents is not None, INITIAL=initial is not None,
                BORDERS=plan.parallel or segment > 0, PARALLEL=plan.parallel,
                VARLEN=self.packing is not None, EVEN=self.even, **settings,
            )  # fmt: skip
        if not plan.parallel:
            borders[:, 0] = 0.0 if initial is None else initial
        return y, final, borders

    def segment_states(
        self,
        u: Tensor,
        V: Tensor,
        sums: Tensor,
        inserts: Tensor,
        borders: Tensor,
        start: Tensor | None,
        backwards: bool,
    ) -> None:
        """Fill borders (rows, segments, H, P, N): the state that enters each segment, backwards from its
        end."""
        plan, keeps = self.plan, borders.new_empty(borders.shape[:3])
        self.states(
            u, V, sums, inserts, backwards=backwards, first=0, chunks=self.chunks,
            segments=(1 if backwards else 0, plan.segments - 1), ends=borders, keeps=keeps,
        )  # fmt: skip
        size = self.headdim * self.d_state
        merge_kernel[(self.rows * self.heads * triton.cdiv(size, MERGE_BLOCK),)](
            borders, keeps, start, plan.segments, self.heads, size,
            BLOCK=MERGE_BLOCK, BACKWARDS=backwards, INITIAL=start is not None,
        )  # fmt: skip

    def states(
        self,
        u: Tensor,
        V: Tensor,
        sums: Tensor,
        inserts: Tensor,
        *,
        backwards: bool,
        first: int,
        chunks: int,
        segments: tuple[int, int],
        borders: Tensor | None = None,
        states: Tensor | None = None,
        ends: Tensor | None = None,
        keeps: Tensor | None = None,
        segment_chunks: int | None = None,
    ) -> None:
        """Launch `states_kernel`; segments: the first and how many. 5-dimensional borders and ends are by
        segment."""
        packing, segment_chunks = self.packing, segment_chunks or self.plan.segment_chunks
        first_segment, count = segments
        settings = self.pick("states", states_configs(*self.shape))
        blocks = triton.cdiv(self.d_state, settings["BLOCK_N"])
        states_kernel[(self.rows * count * self.heads * blocks,)](
            u, V, sums, inserts, self.documents, self.cu_seqlens, None if packing is None else
            packing.first_slot,
            borders, states, ends, keeps, *u.stride()[:3], *V.stride()[:3],
            self.length, first, chunks, count, first_segment, segment_chunks, self.plan.segments,
            self.heads, self.headdim, self.d_state, self.heads // self.groups,
            Q=self.plan.chunk, BLOCK_P=self.block_p, BACKWARDS=backwards, DOCUMENTS=self.documents is not
            None,
            BORDERS=0 if borders is None else 1 if borders.dim() == 5 else 2, STORE=states is not None,
            ENDS=0 if ends is None else 1 if ends.dim() == 5 else 2, VARLEN=packing is not None,
            EVEN=self.even,
            **settings,
        )  # fmt: skip

    def backward(
        self,
        sums: Tensor,
        inserts: Tensor,
        D: Tensor | None,
        borders: Tensor,
        dy: Tensor,
        dfinal: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """dx, dB, dC, dsums, dinserts, dD, dinitial."""
        x, B, C, plan = self.x, self.B, self.C, self.plan
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dB, dC = (torch.empty(B.shape, dtype=x.dtype, device=x.device) for _ in range(2))
        dsums, dinserts = torch.empty_like(sums), torch.empty_like(inserts)
        slots = self.slots(plan.slab_chunks)
        buffer = (slots, self.heads, self.d_state, self.headdim)
        states, dstates = (x.new_empty(buffer) for _ in range(2))
        dD = sums.new_zeros(() if D is None else (plan.slabs, slots, *D.shape))
        dinitial = torch.zeros_like(self.state()) if dfinal is None else dfinal.clone()
        ends = dinitial
        if plan.parallel:
            ends = self.state(plan.segments)
            self.segment_states(dy, C, sums, inserts, ends, dfinal, backwards=True)
        for slab in reversed(range(plan.slabs)):
            first = slab * plan.slab_chunks
            chunks = min(plan.slab_chunks, self.chunks - first)
            where = (first // plan.segment_chunks, triton.cdiv(chunks, plan.segment_chunks))
            span = {"first": first, "chunks": chunks, "segments": where}
            self.states(x, B, sums, inserts, backwards=False, borders=borders, states=states, **span)
            self.states(
                dy, C, sums, inserts, backwards=True, borders=ends, states=dstates, ends=dinitial, **span
            )
            dD_slab = dD if D is None else dD[slab]
            self._gradients(
                dy, sums, inserts, D, states, dstates, first, chunks, dx, dB, dC, dsums, dinserts, dD_slab
            )
        return dx, dB, dC, dsums, dinserts, dD if D is None else dD.sum((0, 1)), dinitial

    def _gradients(
        self, dy: Tensor, sums: Tensor, inserts: Tensor, D: Tensor | None, states: Tensor, dstates: Tensor,
        first: int, chunks: int, dx: Tensor, dB: Tensor, dC: Tensor, dsums: Tensor, dinserts: Tensor, dD:
        Tensor,
    ) -> None:  # fmt: skip
        x, B, C, plan = self.x, self.B, self.C, self.plan
        slots, heads = self.slots(chunks), self.heads // self.groups
        splits = 1  # of a group's heads, until two programs a processor have work
        while slots * self.groups * splits < 1.9 * processors(x.device) and heads % (2 * splits) == 0:
            splits *= 2
        dscores = sums.new_empty(slots * self.groups * splits, plan.chunk, plan.chunk)
        sizes = (self.heads, self.headdim, self.d_state, self.groups, heads, splits)
        options = {
            "Q": plan.chunk,
            "BLOCK_P": self.block_p,
            "DOCUMENTS": self.documents is not None,
            "VARLEN": self.packing is not None,
            "EVEN": self.even,
        }
        chunk_gradient_kernel[(len(dscores),)](
            x, B, C, dy, sums, inserts, D, self.documents, self._slot_table, states, dstates,
            dx, dsums, dinserts, dD, dscores,
            *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *dy.stride()[:3],
            self.length, first, chunks, slots, *sizes, BLOCK_N=self.block_n, D_KIND=0 if D is None else
            D.dim(),
            **options, **self.pick("chunk_gradient", chunk_gradient_configs(*self.shape)),
        )  # fmt: skip
        settings = self.pick("group_gradient", group_gradient_configs(*self.shape))
        programs = slots * self.groups * triton.cdiv(self.d_state, settings["BLOCK_N"])
        for u, V, held, out in ((x, C, dstates, dB), (dy, B, states, dC)):
            group_gradient_kernel[(programs,)](
                u, V, sums, inserts, self.documents, self._slot_table, held, dscores, out,
                *u.stride()[:3], *V.stride()[:3], self.length, first, chunks, slots, *sizes,
                OF_C=out is dC, **options, **settings,
            )  # fmt: skip

    @property
    def _slot_table(self) -> Tensor | None:
        return None if self.packing is None else self.packing.slots


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("longstate::ssd_scan", mutates_args=())
def _scan(
    x: Tensor, dt: Tensor, rate: Tensor | None, log_alpha: Tensor | None, weight: Tensor | None, bias: Tensor
    | None,
    insert: Tensor | None, B: Tensor, C: Tensor, D: Tensor | None, initial: Tensor | None, documents: Tensor
    | None,
    cu_seqlens: Tensor | None, softplus: bool, low: float, high: float, segments: int,
) -> Outputs:  # fmt: skip
    """y, final state, chunk sums, insertion weights, states that enter the segments."""
    decay = _Decay(dt, rate, log_alpha, weight, bias, insert, softplus, low, high)
    with on_device(x):
        call = _Call(x, B, C, documents, cu_seqlens, segments)
        sums, inserts = call.decay_sums(decay)
        y, final, borders = call.forward(sums, inserts, D, initial)
    return y, final, sums, inserts, borders


@_scan.register_fake
def _scan_fake(
    x: Tensor, dt: Tensor, rate: Tensor | None, log_alpha: Tensor | None, weight: Tensor | None, bias: Tensor
    | None,
    insert: Tensor | None, B: Tensor, C: Tensor, D: Tensor | None, initial: Tensor | None, documents: Tensor
    | None,
    cu_seqlens: Tensor | None, softplus: bool, low: float, high: float, segments: int,
) -> Outputs:  # fmt: skip
    call = _Call(x, B, C, documents, cu_seqlens, segments)
    sums = x.new_empty(call.batch, call.heads, call.length, dtype=torch.float32)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, call.state(), sums, torch.empty_like(sums), call.state(call.plan.segments)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("longstate::ssd_scan_backward", mutates_args=())
def _scan_backward(
    x: Tensor, dt: Tensor, rate: Tensor | None, log_alpha: Tensor | None, weight: Tensor | None, bias: Tensor
    | None,
    insert: Tensor | None, B: Tensor, C: Tensor, D: Tensor | None, documents: Tensor | None,
    cu_seqlens: Tensor | None, softplus: bool, low: float, high: float, segments: int,
    sums: Tensor, inserts: Tensor, borders: Tensor, dy: Tensor, dfinal: Tensor | None,
) -> Gradients:  # fmt: skip
    """dx, ddt, gradients of rate, log_alpha, weight and bias (4, H), dinsert, dB, dC, dD, dinitial."""
    decay = _Decay(dt, rate, log_alpha, weight, bias, insert, softplus, low, high)
    with on_device(x):
        call = _Call(x, B, C, documents, cu_seqlens, segments)
        dx, dB, dC, dsums, dinserts, dD, dinitial = call.backward(sums, inserts, D, borders, dy, dfinal)
        ddt, dinsert, per_head = call.decay_sums_backward(decay, dsums, dinserts)
    return dx, ddt, per_head, dinsert, dB, dC, dD, dinitial


@_scan_backward.register_fake
def _scan_backward_fake(
    x: Tensor, dt: Tensor, rate: Tensor | None, log_alpha: Tensor | None, weight: Tensor | None, bias: Tensor
    | None,
    insert: Tensor | None, B: Tensor, C: Tensor, D: Tensor | None, documents: Tensor | None,
    cu_seqlens: Tensor | None, softplus: bool, low: float, high: float, segments: int,
    sums: Tensor, inserts: Tensor, borders: Tensor, dy: Tensor, dfinal: Tensor | None,
) -> Gradients:  # fmt: skip
    def like(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype, device=t.device)

    initial = borders.new_empty(borders.shape[0], *borders.shape[2:])
    dinsert = dt.new_empty(0, dtype=torch.float32) if insert is None else like(sums.transpose(1, 2))
    dD = sums.new_empty(()) if D is None else like(D)
    return like(x), like(dt), sums.new_empty(4, x.shape[2]), dinsert, like(B), like(C), dD, initial


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, dt, rate, log_alpha, weight, bias, insert, B, C, D, initial, documents, cu_seqlens, *options = inputs
    _, _, sums, inserts, borders = output
    ctx.mark_non_differentiable(sums, inserts, borders)
    ctx.save_for_backward(
        x, dt, rate, log_alpha, weight, bias, insert, B, C, D, documents, cu_seqlens, sums, inserts, borders
    )
    ctx.options, ctx.has_initial = options, initial is not None


def _backward(ctx: Any, dy: Tensor, dfinal: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, (sums, inserts, borders) = ctx.saved_tensors[:-3], ctx.saved_tensors[-3:]
    rate, log_alpha, weight, bias, insert = inputs[2:7]
    D = inputs[9]
    if dy.stride(3) != 1:
        dy = dy.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    dx, ddt, per_head, dinsert, dB, dC, dD, dinitial = _scan_backward(
        *inputs, *ctx.options, sums, inserts, borders, dy, dfinal
    )
    given = [
        None if t is None else g.to(t.dtype)
        for t, g in zip((rate, log_alpha, weight, bias), per_head, strict=True)
    ]
    return (
        dx, ddt, *given, None if insert is None else dinsert, dB, dC, None if D is None else dD.to(D.dtype),
        dinitial if ctx.has_initial else None, *[None] * 6,
    )  # fmt: skip


_scan.register_autograd(_backward, setup_context=_setup_context)


def triton_scan(
    x: Tensor,
    log_decay: Tensor,
    insert: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    document_starts: Tensor | None,
    chunk_size: int = 0,
    *,
    segments: int = 0,
) -> tuple[Tensor, Tensor]:
    """As `kernels.ssd.chunked.chunked_scan`. `chunk_size` plays no part: `triton_schedule` chooses.

    segments: 0 for the rule of `triton_schedule`, else how many to cut each row into.
    """
    return _call(
        x, log_decay.float(), None, None, None, None, insert.float(), B, C, D, initial_state,
        document_starts, None,
        False, None, segments,
    )  # fmt: skip


def triton_fused_scan(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    log_alpha: Tensor | None,
    weight: Tensor | None,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
    segments: int = 0,
) -> tuple[Tensor, Tensor]:
    """The scan with its discretisation in the kernels.

    rate, log_alpha, weight: (H,), see `kernels.ssd.discretize.per_head_factors`. Otherwise as
    `kernels.ssd.ssd_scan`.
    """
    return _call(
        x, dt, rate, log_alpha, weight, dt_bias, None, B, C, D, initial_state, document_starts, cu_seqlens,
        dt_softplus, dt_limit, segments,
    )  # fmt: skip


def _call(
    x: Tensor, dt: Tensor, rate: Tensor | None, log_alpha: Tensor | None, weight: Tensor | None, bias: Tensor
    | None,
    insert: Tensor | None, B: Tensor, C: Tensor, D: Tensor | None, initial: Tensor | None, starts: Tensor |
    None,
    cu_seqlens: Tensor | None, softplus: bool, limit: tuple[float, float] | None, segments: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    state_bytes = triton.next_power_of_2(x.shape[3]) * triton.next_power_of_2(B.shape[3]) * x.element_size()
    if state_bytes > LARGEST_STATE and torch.is_grad_enabled():
        raise ValueError(
            f"headdim={x.shape[3]}, d_state={B.shape[3]}: a state of {state_bytes} bytes is more "
            f"than the {LARGEST_STATE} of the Triton backward pass: use backend='chunked' or no_grad()"
        )
    low, high = limit or (0.0, LARGEST)
    x, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, B, C))
    per_head = (None if t is None else t.float().contiguous() for t in (rate, log_alpha, weight, bias))
    D = None if D is None else D.float().contiguous()
    initial = None if initial is None else initial.float().contiguous()
    documents = None if starts is None else starts.to(torch.int32).cumsum(1, dtype=torch.int32)
    y, final, *_ = _scan(
        x, dt, *per_head, insert, B, C, D, initial, documents, cu_seqlens, softplus, float(low),
        min(float(high), LARGEST),
        segments,
    )  # fmt: skip
    return y, final

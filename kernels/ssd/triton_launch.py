"""The launches of one call of the Triton scan, forward and backward.

    decay_sums   dt -> chunk sums of log decays, insertion weights, (B, H, T) fp32, and their gradients
    forward      everything else, one program a head and row
    backward     a slab of time after another, from the last: states that enter its chunks, gradients of those
                 that leave, then all gradients; memory is bounded by the slab, not by T

Where rows x heads leave the GPU idle, time is cut into segments that run side by side: one more pass over x
and B finds what each segment adds to the state (`states_kernel`), then `merge_kernel` what enters it.
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
    Schedule,
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
from kernels.tuning import Config, bucket, pick

HEADS_PER_BLOCK, MERGE_BLOCK = 16, 256
# Stands for an absent upper limit of dt: an infinity does not survive torch.compile's source.
LARGEST = 3.0e38


Inputs = tuple[Tensor, Tensor, Tensor]  # x, B and C, or their gradients


class Decay(NamedTuple):
    """What retentions and weights come from: dt and numbers per head, or log decays `dt` and `insert`."""

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


class Ends(NamedTuple):
    """What segments add to a state (or, backwards, say of the one that enters them), and what they keep of
    one: (rows, segments, H, P, N) and (rows, segments, H), fp32."""

    added: Tensor
    keeps: Tensor

    @property
    def kept(self) -> Tensor:
        """What all of them keep, (rows, H)."""
        return self.keeps.prod(1)


class Launches:
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
        self.rows = self.batch if cu_seqlens is None else len(cu_seqlens) - 1
        self.plan = self._plan(segments, packed=cu_seqlens is not None)
        self.packing = None
        if cu_seqlens is not None:
            self.packing = Packing.of(cu_seqlens, self.length, self.plan.chunk)
        self.chunks = (
            triton.cdiv(self.length, self.plan.chunk) if cu_seqlens is None else self.plan.slab_chunks
        )
        self.block_p = tile(self.headdim, x.element_size())
        self.block_n = tile(self.d_state, x.element_size())
        self.even = self.headdim == self.block_p and self.d_state == self.block_n

    def _plan(self, segments: int, packed: bool) -> Schedule:
        if packed:
            return packed_schedule(self.length, self.rows, *self.shape)
        return schedule(self.rows, self.length, self.heads, *self.shape, processors(self.x.device), segments)

    @property
    def held_shape(self) -> tuple[int, int]:
        """A state as the backward pass keeps it."""
        return self.d_state, self.headdim

    @property
    def cu_seqlens(self) -> Tensor | None:
        return None if self.packing is None else self.packing.cu_seqlens

    def slots(self, chunks: int) -> int:
        """Chunks in a buffer of `chunks` chunks of every row."""
        return self.rows * chunks if self.packing is None else self.packing.slots.shape[1]

    def state(self, count: int | None = None) -> Tensor:
        """Room for fp32 states: (rows, H, P, N), or (rows, count, H, P, N)."""
        shape = (self.rows, self.heads, self.headdim, self.d_state)
        return self.x.new_empty(
            shape if count is None else (self.rows, count, *shape[1:]), dtype=torch.float32
        )

    def pick(self, kernel: str, configs: tuple[Config, ...]) -> dict[str, Any]:
        """Launch settings."""
        shape = {"P": self.headdim, "N": self.d_state, "G": self.groups, "dtype": str(self.x.dtype)[6:]}
        return pick(kernel, configs, heads=self.rows * self.heads, T=bucket(self.length), **shape).settings()

    def decay_sums(self, decay: Decay) -> tuple[Tensor, Tensor]:
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
        self,
        decay: Decay,
        dsums: Tensor,
        dinserts: Tensor,
        more: Tensor | None = None,
        ddt: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ddt, dinsert (empty unless it was given) and the gradients of the per-head numbers (4, H).

        more (B, H, T): gradients of log decays beside those of their sums. ddt: where to write it.
        """
        d, n_slots = decay, self.slots(self.chunks)
        shape = (self.batch, self.length, self.heads)
        raw = d.insert is not None
        ddt = d.dt.new_empty(shape) if ddt is None else ddt
        dinsert = d.dt.new_empty(shape if raw else (0,), dtype=torch.float32)
        partial = self.x.new_empty(
            (0, 4, self.heads) if raw else (n_slots, 4, self.heads), dtype=torch.float32
        )
        decay_sums_backward_kernel[(n_slots * triton.cdiv(self.heads, HEADS_PER_BLOCK),)](
            d.dt, d.bias, d.rate, d.weight, self._slot_table, dsums, dinserts, more, ddt, dinsert, partial,
            *d.dt.stride(), *ddt.stride()[:2], d.low, d.high, self.length, self.chunks, n_slots, self.heads,
            Q=self.plan.chunk, BLOCK_H=HEADS_PER_BLOCK, **d.kinds, VARLEN=self.packing is not None,
        )  # fmt: skip
        return ddt, dinsert, partial.sum(0)

    def forward(
        self,
        sums: Tensor,
        inserts: Tensor,
        D: Tensor | None,
        initial: Tensor | None,
        ends: Ends | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y, final state, and the states that enter the segments (rows, segments, H, P, N).

        ends: `all_ends` of x and B, if they are there already; used up.
        """
        x, B, C, plan = self.x, self.B, self.C, self.plan
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        final = self.state()
        if plan.parallel:
            borders = self.segment_states(x, B, sums, inserts, initial, backwards=False, ends=ends)
        else:
            borders = self.state(plan.segments)
        programs = self.rows * self.heads * triton.cdiv(self.headdim, plan.block_p)
        settings = self.pick("scan_forward", forward_configs(*self.shape))
        for segment in (0,) if plan.parallel else range(plan.segments):
            scan_forward_kernel[(programs * (plan.segments if plan.parallel else 1),)](
                x, B, C, sums, inserts, D, self.documents, initial, borders, self.cu_seqlens, y, final,
                *x.stride()[:3], *B.stride()[:3], *C.stride()[:3],
                self.length, plan.segments, segment, plan.segment_chunks, self.heads, self.headdim,
                self.d_state, self.heads // self.groups,
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
        start: Tensor | None,
        backwards: bool,
        ends: Ends | None = None,
    ) -> Tensor:
        """The state that enters each segment, or R at its end: (rows, segments, H, P, N).

        ends: `all_ends` of u and V, if they are there already; used up.
        """
        if ends is None:
            ends = self._room_for_ends()
            if self.plan.segments > 1:  # the last one's in this direction nobody asks for
                segments = (1 if backwards else 0, self.plan.segments - 1)
                self.segment_ends(u, V, sums, inserts, ends, segments, backwards)
        self._merge(ends, start, None, backwards)
        return ends.added

    def all_ends(self, u: Tensor, V: Tensor, sums: Tensor, inserts: Tensor, backwards: bool) -> Ends:
        """Of every segment; of rows that are not packed."""
        ends = self._room_for_ends()
        self.segment_ends(u, V, sums, inserts, ends, (0, self.plan.segments), backwards)
        return ends

    def sum_of(self, ends: Ends, backwards: bool) -> Tensor:
        """What all segments together add to a state, (rows, H, P, N)."""
        total = self.state()
        self._merge(ends, None, total, backwards)
        return total

    def _room_for_ends(self) -> Ends:
        added = self.state(self.plan.segments)
        return Ends(added, added.new_empty(added.shape[:3]))

    def _merge(self, ends: Ends, start: Tensor | None, total: Tensor | None, backwards: bool) -> None:
        size = self.headdim * self.d_state
        merge_kernel[(self.rows * self.heads * triton.cdiv(size, MERGE_BLOCK),)](
            *ends, start, total, self.plan.segments, self.heads, size, BLOCK=MERGE_BLOCK,
            BACKWARDS=backwards, INITIAL=start is not None, TOTAL=total is not None, num_warps=1,
        )  # fmt: skip

    def segment_ends(
        self,
        u: Tensor,
        V: Tensor,
        sums: Tensor,
        inserts: Tensor,
        ends: Ends,
        segments: tuple[int, int],
        backwards: bool,
    ) -> None:
        """Fill ends. segments: the first, and how many."""
        self.states(
            u, V, sums, inserts, backwards=backwards, first=0, chunks=self.chunks, segments=segments,
            ends=ends.added, keeps=ends.keeps,
        )  # fmt: skip

    def slab_states(
        self,
        sums: Tensor,
        inserts: Tensor,
        dy: Tensor,
        borders: Tensor | None,
        ends: Tensor | None,
        dinitial: Tensor,
        states: Tensor,
        dstates: Tensor,
        first: int,
        chunks: int,
        segments: tuple[int, int],
    ) -> None:
        """Fill states and dstates, those that enter the chunks of a slab and gradients of those that leave.

        borders: the states before each segment (rows, segments, H, P, N). ends: the gradients behind each
        segment, or behind the slab (rows, H, P, N). None for zero. dinitial: the gradient before the slab.
        """
        span: dict[str, Any] = {"first": first, "chunks": chunks, "segments": segments}
        self.states(self.x, self.B, sums, inserts, backwards=False, borders=borders, states=states, **span)
        self.states(
            dy, self.C, sums, inserts, backwards=True, borders=ends, states=dstates, ends=dinitial, **span
        )

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
    ) -> None:
        """Launch `states_kernel`. segments: the first, and how many; 5-dimensional borders are by segment."""
        packing = self.packing
        first_segment, count = segments
        settings = self.pick("states", states_configs(*self.shape))
        blocks = triton.cdiv(self.d_state, settings["BLOCK_N"])
        states_kernel[(self.rows * count * self.heads * blocks,)](
            u, V, sums, inserts, self.documents, self.cu_seqlens,
            None if packing is None else packing.first_slot, borders, states, ends, keeps,
            *u.stride()[:3], *V.stride()[:3],
            self.length, first, chunks, count, first_segment, self.plan.segment_chunks, self.plan.segments,
            self.heads, self.headdim, self.d_state, self.heads // self.groups,
            Q=self.plan.chunk, BLOCK_P=self.block_p, BACKWARDS=backwards,
            DOCUMENTS=self.documents is not None,
            BORDERS=0 if borders is None else 1 if borders.dim() == 5 else 2, STORE=states is not None,
            ENDS=0 if ends is None else 1 if ends.dim() == 5 else 2, VARLEN=packing is not None,
            EVEN=self.even, **settings,
        )  # fmt: skip

    def backward(
        self,
        sums: Tensor,
        inserts: Tensor,
        D: Tensor | None,
        borders: Tensor,
        dy: Tensor,
        dfinal: Tensor | None,
        into: Inputs | None = None,
        ends: Ends | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """dx, dB, dC, dsums, dinserts, dD, dinitial.

        into: where dx, dB and dC are written: each (B, T, heads, columns) with heads side by side, rows
        behind each other, any step from token to token. ends: `all_ends` of dy and C backwards, if they are
        there already; used up.
        """
        dinitial = torch.zeros_like(self.state()) if dfinal is None else dfinal.clone()
        behind = dinitial
        if self.plan.parallel:
            behind = self.segment_states(dy, self.C, sums, inserts, dfinal, backwards=True, ends=ends)
        gradients = self.all_gradients(sums, inserts, D, borders, behind, dy, dinitial, into)
        return *gradients, dinitial

    def all_gradients(
        self,
        sums: Tensor,
        inserts: Tensor,
        D: Tensor | None,
        borders: Tensor | None,
        ends: Tensor | None,
        dy: Tensor,
        dinitial: Tensor,
        into: Inputs | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """dx, dB, dC, dsums, dinserts, dD; dinitial in place. borders, ends: as `slab_states` takes them."""
        x, plan = self.x, self.plan
        dx, dB, dC = into or (
            torch.empty(t.shape, dtype=x.dtype, device=x.device) for t in (x, self.B, self.C)
        )
        dsums, dinserts = torch.empty_like(sums), torch.empty_like(inserts)
        slots = self.slots(plan.slab_chunks)
        buffer = (slots, self.heads, *self.held_shape)
        states, dstates = (x.new_empty(buffer) for _ in range(2))
        dD = sums.new_zeros(() if D is None else (plan.slabs, slots, *D.shape))
        for slab in reversed(range(plan.slabs)):
            first = slab * plan.slab_chunks
            chunks = min(plan.slab_chunks, self.chunks - first)
            where = (first // plan.segment_chunks, triton.cdiv(chunks, plan.segment_chunks))
            self.slab_states(
                sums, inserts, dy, borders, ends, dinitial, states, dstates, first, chunks, where
            )
            dD_slab = dD if D is None else dD[slab]
            self._gradients(
                dy, sums, inserts, D, states, dstates, first, chunks, dx, dB, dC, dsums, dinserts, dD_slab
            )
        return dx, dB, dC, dsums, dinserts, dD if D is None else dD.sum((0, 1))

    def _gradients(
        self,
        dy: Tensor,
        sums: Tensor,
        inserts: Tensor,
        D: Tensor | None,
        states: Tensor,
        dstates: Tensor,
        first: int,
        chunks: int,
        dx: Tensor,
        dB: Tensor,
        dC: Tensor,
        dsums: Tensor,
        dinserts: Tensor,
        dD: Tensor,
    ) -> None:
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
            *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *dy.stride()[:3], *dx.stride()[:2],
            self.length, first, chunks, slots, *sizes, BLOCK_N=self.block_n,
            D_KIND=0 if D is None else D.dim(), **options,
            **self.pick("chunk_gradient", chunk_gradient_configs(*self.shape)),
        )  # fmt: skip
        settings = self.pick("group_gradient", group_gradient_configs(*self.shape))
        programs = slots * self.groups * triton.cdiv(self.d_state, settings["BLOCK_N"])
        for u, V, held, out in ((x, C, dstates, dB), (dy, B, states, dC)):
            group_gradient_kernel[(programs,)](
                u, V, sums, inserts, self.documents, self._slot_table, held, dscores, out,
                *u.stride()[:3], *V.stride()[:3], *out.stride()[:2],
                self.length, first, chunks, slots, *sizes, OF_C=out is dC, **options, **settings,
            )  # fmt: skip

    @property
    def _slot_table(self) -> Tensor | None:
        return None if self.packing is None else self.packing.slots

"""The launches of one call of the Triton scan, forward and backward.

decay_sums   dt -> chunk sums of log decays, insertion weights, (B, H, T) fp32, and their gradients
forward      everything else, one program a head and row, or head and segment (`triton_segments`)
backward     a slab of time after another, from the last: states that enter its chunks, gradients of those
             that leave, then all gradients; memory is bounded by the slab, not by T
"""

from typing import Any

import torch
import triton
from torch import Tensor

from kernels.ssd.triton_backward import chunk_gradient_kernel, group_gradient_kernel
from kernels.ssd.triton_forward import scan_forward_kernel
from kernels.ssd.triton_schedule import (
    chunk_gradient_configs,
    forward_configs,
    group_gradient_configs,
    processors,
)
from kernels.ssd.triton_segments import Ends, Segments

Inputs = tuple[Tensor, Tensor, Tensor]  # x, B and C, or their gradients


class Launches(Segments):
    """The launches of one call."""

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

"""Rows cut into segments that run side by side, where rows x heads leave the GPU idle: one more pass over x
and B finds what each segment adds to the state (`states_kernel`), then `merge_kernel` what enters it."""

from typing import NamedTuple

import triton
from torch import Tensor

from kernels.ssd.triton_call import Call
from kernels.ssd.triton_schedule import states_configs
from kernels.ssd.triton_states import merge_kernel, states_kernel

MERGE_BLOCK = 256


class Ends(NamedTuple):
    """What segments add to a state (or, backwards, say of the one that enters them), and what they keep of
    one: (rows, segments, H, P, N) and (rows, segments, H), fp32."""

    added: Tensor
    keeps: Tensor

    @property
    def kept(self) -> Tensor:
        """What all of them keep, (rows, H)."""
        return self.keeps.prod(1)


class Segments(Call):
    """The launches for states at the borders of segments, in either direction, and within them."""

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

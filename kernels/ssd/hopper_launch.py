"""The launches of one call of the scan on Hopper, for the shapes that its kernels take."""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float16
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.ssd.hopper_clip import hopper_clip_kernel
from kernels.ssd.hopper_forward import hopper_forward_kernel
from kernels.ssd.hopper_gradient import hopper_gradient_kernel
from kernels.ssd.hopper_reach import hopper_reach_kernel
from kernels.ssd.hopper_schedule import (
    COLUMNS,
    GRADIENT_CONFIGS,
    clip_configs,
    forward_configs,
    hopper_schedule,
    states_configs,
)
from kernels.ssd.hopper_states import hopper_ends_kernel, hopper_slab_kernel
from kernels.ssd.hopper_tiles import CHANNELS, CHUNK
from kernels.ssd.triton_launch import Inputs, Launches
from kernels.ssd.triton_schedule import Schedule, processors
from kernels.ssd.triton_segments import Ends
from kernels.tuning import Config

ALIGNMENT = 16  # bytes: of addresses and strides that TMA takes


class Clip(NamedTuple):
    """A state's norm is brought down to max_norm (H,) after every `chunks` chunks; `before` came earlier."""

    max_norm: Tensor
    chunks: int
    before: int


class HopperLaunches(Launches):
    """`Launches` on the kernels of this folder's `hopper_*.py`."""

    def __init__(
        self,
        x: Tensor,
        B: Tensor,
        C: Tensor,
        *rest: Any,
        apart: int = 0,
        reversed: bool = False,
    ) -> None:
        """apart: the state is zero before every so many chunks. reversed: time runs backwards in
        `all_gradients`, nothing decays, and borders and ends are those of dy and x."""
        self.apart, self.reversed = apart, reversed
        super().__init__(_readable(x), _readable(B), _readable(C), *rest)
        self._descriptors: dict[tuple[int, int], TensorDescriptor] = {}

    def _plan(self, segments: int, packed: bool) -> Schedule:
        if packed:
            chunks = self.length // CHUNK + self.rows  # at most
            return Schedule(CHUNK, CHANNELS, 1, chunks, False, chunks)
        sizes = (self.length, self.heads, self.headdim, self.d_state, self.groups)
        plan = hopper_schedule(self.rows, *sizes, processors(self.x.device), segments)
        if self.apart:
            slab = max(1, plan.slab_chunks // self.apart) * self.apart
            count = triton.cdiv(self.length, CHUNK * self.apart)
            return Schedule(CHUNK, CHANNELS, count, self.apart, True, slab)
        if self.reversed and not plan.parallel:  # states of both directions begin at segments
            return hopper_schedule(self.rows, *sizes, processors(self.x.device), max(2, plan.segments))
        return plan

    @property
    def held_shape(self) -> tuple[int, int]:
        return self.headdim, self.d_state

    def forward(
        self,
        sums: Tensor,
        inserts: Tensor,
        D: Tensor | None,
        initial: Tensor | None,
        ends: Ends | None = None,
        clip: Clip | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        plan = self.plan
        assert clip is None or self.headdim == CHANNELS
        y = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)
        final = self.state()
        if self.apart:
            borders = self.state(0)
        elif plan.parallel and clip is not None:
            borders = self._clipped_states(sums, inserts, initial, clip)
        elif plan.parallel:
            borders = self.segment_states(self.x, self.B, sums, inserts, initial, False, ends)
        else:
            borders = self.state(plan.segments)
        programs = self.rows * self.heads * (self.headdim // CHANNELS)
        hopper_forward_kernel[(programs * (plan.segments if plan.parallel else 1),)](
            self._tokens(self.x, CHANNELS), self._tokens(self.B, self.d_state),
            self._tokens(self.C, self.d_state),
            self._tokens(y, CHANNELS), y, sums, inserts, D, self.documents, initial, borders, self.cu_seqlens,
            final, None if clip is None else clip.max_norm,
            self.length, plan.segments, plan.segment_chunks, self.heads, self.heads // self.groups,
            0 if clip is None else clip.chunks, 0 if clip is None else clip.before,
            P=self.headdim, CLIP=clip is not None, D_KIND=0 if D is None else D.dim(),
            DOCUMENTS=self.documents is not None, INITIAL=initial is not None, BORDERS=not self.apart,
            PARALLEL=plan.parallel, VARLEN=self.packing is not None,
            **self._settings("hopper_forward", forward_configs(self.d_state)),
        )  # fmt: skip
        return y, final, borders

    def _clipped_states(self, sums: Tensor, inserts: Tensor, initial: Tensor | None, clip: Clip) -> Tensor:
        """The states that enter the segments, of one walk over every row."""
        plan, borders = self.plan, self.state(self.plan.segments)
        if plan.segments == 1:
            return borders.zero_() if initial is None else initial[:, None]
        hopper_clip_kernel[(self.rows * self.heads,)](
            self._tokens(self.x, CHANNELS), self._tokens(self.B, self.d_state), sums, inserts, initial,
            borders, clip.max_norm, self.length, plan.segments, plan.segment_chunks, self.heads,
            self.heads // self.groups, clip.chunks, clip.before, INITIAL=initial is not None,
            **self._settings("hopper_clip", clip_configs(self.d_state)),
        )  # fmt: skip
        return borders

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
        plan, (first, count) = self.plan, segments
        block_n, programs, settings = self._states_settings()
        hopper_ends_kernel[(count * programs,)](
            self._tokens(u, CHANNELS), self._tokens(V, block_n), sums, inserts, self.documents, *ends,
            self.length, count, first, plan.segment_chunks, plan.segments, self.heads,
            self.heads // self.groups, P=self.headdim, N=self.d_state, BACKWARDS=backwards,
            DOCUMENTS=self.documents is not None, REVERSED=self.reversed, **settings,
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
        plan, packing = self.plan, self.packing
        block_n, programs, settings = self._states_settings()
        of_x = self._tokens(self.x, CHANNELS), self._tokens(self.B, block_n), _held(states, block_n)
        of_dy = self._tokens(dy, CHANNELS), self._tokens(self.C, block_n), _held(dstates, block_n)
        forwards, backwards = (of_dy, of_x) if self.reversed else (of_x, of_dy)
        hopper_slab_kernel[(2 * segments[1] * programs,)](
            *forwards, *backwards,
            sums, inserts, self.documents, self.cu_seqlens, None if packing is None else packing.first_slot,
            borders, ends, dinitial, self.length, first, chunks, segments[1], segments[0],
            plan.segment_chunks, plan.segments, self.heads, self.heads // self.groups,
            P=self.headdim, N=self.d_state, DOCUMENTS=self.documents is not None,
            BORDERS=0 if borders is None else 1, ENDS=0 if ends is None else 1 if plan.parallel else 2,
            VARLEN=packing is not None, REVERSED=self.reversed, **settings,
        )  # fmt: skip

    def _states_settings(self) -> tuple[int, int, dict[str, Any]]:
        """Columns of a state in one program, programs a segment, launch settings."""
        settings = self._settings("hopper_states", states_configs(self.d_state))
        block_n = settings.pop("BLOCK_N")
        blocks = self.headdim // CHANNELS * (self.d_state // block_n)
        return block_n, self.rows * self.heads * blocks, settings

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
        dy = _readable(dy)
        if not self.apart:
            return super().backward(sums, inserts, D, borders, dy, dfinal, into, ends)
        assert dfinal is None
        dinitial = self.state()
        return *self.all_gradients(sums, inserts, D, None, None, dy, dinitial, into), dinitial

    def reversed_gradients(
        self, inserts: Tensor, dy: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """dx, dB, dC, dscales, dinserts of y_t = C_t . (the sum over i >= t of inserts_i x_i B_i^T).

        dscales (B, H, T): what a scale of y_t would have as gradient, less inserts * dinserts.
        """
        sums, borders, ends = torch.zeros_like(inserts), None, None
        if not self.apart:
            borders = self.segment_states(dy, self.C, sums, inserts, None, backwards=False)
            ends = self.segment_states(self.x, self.B, sums, inserts, None, backwards=True)
        return self.all_gradients(sums, inserts, None, borders, ends, dy, self.state())[:5]

    def add_reach(self, y: Tensor, keeps: Tensor, inserts: Tensor, reaches: Tensor, window: int) -> None:
        """Add to y what windows reach of the block before: `hopper_reach_kernel`."""
        blocks = triton.cdiv(self.length - window, window)
        programs = self.batch * blocks * self.heads * (self.headdim // CHANNELS)
        hopper_reach_kernel[(programs,)](
            self._tokens(self.x, CHANNELS), self._tokens(self.B, self.d_state),
            self._tokens(self.C, self.d_state), self._tokens(y, CHANNELS), y, keeps, inserts, reaches,
            self.length, window, blocks, self.heads, self.heads // self.groups, P=self.headdim,
            **self._settings("hopper_reach", forward_configs(self.d_state)),
        )  # fmt: skip

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
        slots, heads = self.slots(chunks), self.heads // self.groups
        splits = 1  # of a group's heads, while fewer than half of the processors have work
        while 2 * slots * self.groups * splits <= processors(self.x.device) and heads % (2 * splits) == 0:
            splits *= 2
        parts, start, length, step = (dB, dC), 0, self.length, _step(dB)
        if splits > 1:
            if self.packing is None:
                start, length = first * CHUNK, min(chunks * CHUNK, self.length - first * CHUNK)
            shape, step = (splits, self.batch, length, *dB.shape[2:]), self.groups * self.d_state
            parts = (dB.new_empty(shape, dtype=torch.float32), dB.new_empty(shape, dtype=torch.float32))
        block_n = min(self.d_state, COLUMNS)
        for n in range(0, self.d_state, block_n):
            hopper_gradient_kernel[(slots * self.groups * splits,)](
                self._tokens(self.x, CHANNELS), self._tokens(self.B, block_n), self._tokens(self.C, block_n),
                self._tokens(dy, CHANNELS), _held(states, block_n), _held(dstates, block_n),
                self._tokens(dx, CHANNELS), dx, sums, inserts, D, self.documents, self._slot_table,
                dsums, dinserts, dD, *parts, self.length, first, chunks, slots, start, length, _step(dx),
                step, n, self.heads, self.groups, heads, splits, P=self.headdim, N=self.d_state,
                D_KIND=0 if D is None or n > 0 else D.dim(), DOCUMENTS=self.documents is not None,
                VARLEN=self.packing is not None, REVERSED=self.reversed, ADD=n > 0,
                **self._settings("hopper_gradient", GRADIENT_CONFIGS),
            )  # fmt: skip
        if splits > 1:
            for whole, part in zip((dB, dC), parts, strict=True):
                whole[:, start : start + length] = part.sum(0)

    def _tokens(self, t: Tensor, width: int) -> TensorDescriptor:
        """t (B, T, heads, columns) by tiles of a chunk and `width` columns; made once a call."""
        key = (id(t), width)
        if key not in self._descriptors:
            shape, layout = [t.shape[0] * t.shape[1], t.shape[2] * t.shape[3]], _layout(CHUNK, width, t.dtype)
            self._descriptors[key] = TensorDescriptor(t, shape, [_step(t), 1], [CHUNK, width], layout)
        return self._descriptors[key]

    def _settings(self, kernel: str, configs: tuple[Config, ...]) -> dict[str, Any]:
        settings = self.pick(kernel, configs)
        del settings["num_stages"]  # Triton's own pipelining: these kernels do theirs
        return settings


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> NVMMASharedLayout:
    kind = {torch.bfloat16: bfloat16, torch.float16: float16}[dtype]
    return NVMMASharedLayout.get_default_for([rows, columns], kind)


def _held(states: Tensor, width: int) -> TensorDescriptor:
    """(slots, H, P, N) by tiles of 64 channels and `width` columns."""
    flat = states.view(-1, states.shape[-1])
    return TensorDescriptor.from_tensor(flat, [CHANNELS, width], _layout(CHANNELS, width, states.dtype))


def _step(t: Tensor) -> int:
    """Elements from one token to the next; of rows of one token, from row to row."""
    if t.shape[1] > 1:
        return t.stride(1)
    return t.stride(0) if t.shape[0] > 1 else t.shape[2] * t.shape[3]


def _readable(t: Tensor) -> Tensor:
    """t (B, T, heads, columns), copied unless TMA takes it as one matrix (tokens, heads * columns)."""
    batch, length, _, columns = t.shape
    step = _step(t)
    dense = t.stride(3) == 1 and (t.shape[2] == 1 or t.stride(2) == columns)
    one = dense and (batch == 1 or t.stride(0) == length * step) and step >= t.shape[2] * columns
    place = t.storage_offset() * t.element_size() % ALIGNMENT == 0
    return t if one and place and step * t.element_size() % ALIGNMENT == 0 else t.contiguous()

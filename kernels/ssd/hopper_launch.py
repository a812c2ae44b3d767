"""The launches of one call of the scan on Hopper, for the shapes that its kernels take."""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float16
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.ssd.hopper_forward import hopper_forward_kernel
from kernels.ssd.hopper_gradient import hopper_gradient_kernel
from kernels.ssd.hopper_states import hopper_ends_kernel, hopper_slab_kernel
from kernels.ssd.hopper_tiles import CHANNELS, CHUNK
from kernels.ssd.triton_launch import Launches
from kernels.ssd.triton_schedule import SLAB_BYTES, Schedule, processors
from kernels.tuning import Config

ALIGNMENT = 16  # bytes: of addresses and strides that TMA takes
SHORTEST_SEGMENT = 8  # chunks


def hopper_schedule(
    rows: int,
    length: int,
    heads: int,
    headdim: int,
    d_state: int,
    groups: int,
    processors: int,
    segments: int = 0,
) -> Schedule:
    """As `triton_schedule.schedule`. A slab gives every processor a chunk or several for the gradient kernel
    and, where rows are cut, about two segments for the states kernel."""
    chunks, programs = triton.cdiv(length, CHUNK), rows * heads * headdim // CHANNELS
    states_bytes = 2 * rows * heads * headdim * d_state * 2  # of one chunk of every row
    wave = max(1, processors // (rows * groups))  # chunks of a row that run at once
    slab = max(SLAB_BYTES // states_bytes, chunks // 8)
    slab = min(chunks, max(1, round(slab / wave)) * wave)
    if segments == 1 or (segments == 0 and programs >= processors):
        return Schedule(CHUNK, CHANNELS, triton.cdiv(chunks, slab), slab, False, slab)
    if segments == 0:
        segment = min(max(triton.cdiv(slab * programs, 2 * processors), SHORTEST_SEGMENT), chunks)
    else:
        segment = triton.cdiv(chunks, segments)
    slab = max(1, slab // segment) * segment
    return Schedule(CHUNK, CHANNELS, triton.cdiv(chunks, segment), segment, True, slab)


def forward_configs(d_state: int) -> tuple[Config, ...]:
    """Launch settings, the default first. A state of more than 128 columns takes the registers of 8 warps."""
    if d_state > 128:
        return (Config(num_warps=8, meta={"STAGES": 2}),)
    return tuple(Config(num_warps=4, meta={"STAGES": stages}) for stages in (2, 3))


def states_configs(d_state: int) -> tuple[Config, ...]:
    """Launch settings of the states kernel, the default first; BLOCK_N splits a head's state."""
    block_n = min(d_state, 128)
    return (
        Config(num_warps=4, meta={"BLOCK_N": block_n, "STAGES": 2}),
        Config(num_warps=4, meta={"BLOCK_N": block_n, "STAGES": 3}),
        Config(num_warps=4, meta={"BLOCK_N": max(16, block_n // 2), "STAGES": 3}),
    )


def gradient_configs(d_state: int) -> tuple[Config, ...]:
    """Launch settings of the gradient kernel, the default first."""
    stages = (2, 1) if d_state <= 128 else (1,)
    return tuple(Config(num_warps=4, meta={"STAGES": count}) for count in stages)


class Clip(NamedTuple):
    """A state's norm is brought down to max_norm (H,) after every `chunks` chunks; `before` came earlier."""

    max_norm: Tensor
    chunks: int
    before: int


class HopperLaunches(Launches):
    """`Launches` on the kernels of this folder's `hopper_*.py`."""

    def __init__(self, x: Tensor, B: Tensor, C: Tensor, *rest: Any) -> None:
        super().__init__(_readable(x), _readable(B), _readable(C), *rest)
        self._descriptors: dict[tuple[int, int], TensorDescriptor] = {}

    def _plan(self, segments: int, packed: bool) -> Schedule:
        if packed:
            chunks = self.length // CHUNK + self.rows  # at most
            return Schedule(CHUNK, CHANNELS, 1, chunks, False, chunks)
        sizes = (self.length, self.heads, self.headdim, self.d_state, self.groups)
        return hopper_schedule(self.rows, *sizes, processors(self.x.device), segments)

    @property
    def held_shape(self) -> tuple[int, int]:
        return self.headdim, self.d_state

    def forward(
        self,
        sums: Tensor,
        inserts: Tensor,
        D: Tensor | None,
        initial: Tensor | None,
        clip: Clip | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """clip: rows are walked whole, not cut into segments that run side by side."""
        plan = self.plan
        assert clip is None or (not plan.parallel and self.headdim == CHANNELS)
        y = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)
        final, borders = self.state(), self.state(plan.segments)
        if plan.parallel:
            self.segment_states(self.x, self.B, sums, inserts, borders, initial, backwards=False)
        programs = self.rows * self.heads * (self.headdim // CHANNELS)
        hopper_forward_kernel[(programs * (plan.segments if plan.parallel else 1),)](
            self._tokens(self.x, CHANNELS), self._tokens(self.B, self.d_state),
            self._tokens(self.C, self.d_state),
            self._tokens(y, CHANNELS), y, sums, inserts, D, self.documents, initial, borders, self.cu_seqlens,
            final, None if clip is None else clip.max_norm,
            self.length, plan.segments, plan.segment_chunks, self.heads, self.heads // self.groups,
            0 if clip is None else clip.chunks, 0 if clip is None else clip.before,
            P=self.headdim, CLIP=clip is not None, D_KIND=0 if D is None else D.dim(),
            DOCUMENTS=self.documents is not None, INITIAL=initial is not None, PARALLEL=plan.parallel,
            VARLEN=self.packing is not None,
            **self._settings("hopper_forward", forward_configs(self.d_state)),
        )  # fmt: skip
        return y, final, borders

    def segment_ends(
        self,
        u: Tensor,
        V: Tensor,
        sums: Tensor,
        inserts: Tensor,
        ends: Tensor,
        keeps: Tensor,
        backwards: bool,
    ) -> None:
        plan = self.plan
        block_n, programs, settings = self._states_settings()
        hopper_ends_kernel[((plan.segments - 1) * programs,)](
            self._tokens(u, CHANNELS), self._tokens(V, block_n), sums, inserts, self.documents, ends, keeps,
            self.length, plan.segments - 1, 1 if backwards else 0, plan.segment_chunks, plan.segments,
            self.heads, self.heads // self.groups, P=self.headdim, N=self.d_state, BACKWARDS=backwards,
            DOCUMENTS=self.documents is not None, **settings,
        )  # fmt: skip

    def slab_states(
        self,
        sums: Tensor,
        inserts: Tensor,
        dy: Tensor,
        borders: Tensor,
        ends: Tensor,
        dinitial: Tensor,
        states: Tensor,
        dstates: Tensor,
        first: int,
        chunks: int,
        segments: tuple[int, int],
    ) -> None:
        plan, packing = self.plan, self.packing
        block_n, programs, settings = self._states_settings()
        hopper_slab_kernel[(2 * segments[1] * programs,)](
            self._tokens(self.x, CHANNELS), self._tokens(self.B, block_n), _held(states, block_n),
            self._tokens(dy, CHANNELS), self._tokens(self.C, block_n), _held(dstates, block_n),
            sums, inserts, self.documents, self.cu_seqlens, None if packing is None else packing.first_slot,
            borders, ends, dinitial, self.length, first, chunks, segments[1], segments[0],
            plan.segment_chunks, plan.segments, self.heads, self.heads // self.groups,
            P=self.headdim, N=self.d_state, DOCUMENTS=self.documents is not None,
            ENDS=1 if plan.parallel else 2, VARLEN=packing is not None, **settings,
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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return super().backward(sums, inserts, D, borders, _readable(dy), dfinal)

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
        parts: tuple[Tensor, ...] = (dB, dC)
        if splits > 1:
            parts = tuple(t.new_empty((splits, *t.shape), dtype=torch.float32) for t in parts)
        hopper_gradient_kernel[(slots * self.groups * splits,)](
            self._tokens(self.x, CHANNELS), self._tokens(self.B, self.d_state),
            self._tokens(self.C, self.d_state),
            self._tokens(dy, CHANNELS), _held(states, self.d_state), _held(dstates, self.d_state),
            self._tokens(dx, CHANNELS), dx, sums, inserts, D, self.documents, self._slot_table,
            dsums, dinserts, dD, *parts, self.length, first, chunks, slots, self.heads, self.groups, heads,
            splits, P=self.headdim, D_KIND=0 if D is None else D.dim(), DOCUMENTS=self.documents is not None,
            VARLEN=self.packing is not None,
            **self._settings("hopper_gradient", gradient_configs(self.d_state)),
        )  # fmt: skip
        if splits > 1:
            start, end = first * CHUNK, (first + chunks) * CHUNK
            for whole, part in zip((dB, dC), parts, strict=True):
                whole[:, start:end] = part[:, :, start:end].sum(0)

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
    """Elements from one token to the next."""
    return t.stride(1) if t.shape[1] > 1 else t.shape[2] * t.shape[3]


def _readable(t: Tensor) -> Tensor:
    """t (B, T, heads, columns), copied unless TMA takes it as one matrix (tokens, heads * columns)."""
    batch, length, _, columns = t.shape
    step = _step(t)
    dense = t.stride(3) == 1 and (t.shape[2] == 1 or t.stride(2) == columns)
    one = dense and (batch == 1 or t.stride(0) == length * step) and step >= t.shape[2] * columns
    place = t.storage_offset() * t.element_size() % ALIGNMENT == 0
    return t if one and place and step * t.element_size() % ALIGNMENT == 0 else t.contiguous()

"""One call of the Triton scan: shapes and schedule; dt -> its chunk sums of log decays and its weights."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels.ssd.triton_decay import decay_sums_backward_kernel, decay_sums_kernel
from kernels.ssd.triton_rows import Packing
from kernels.ssd.triton_schedule import Schedule, packed_schedule, processors, schedule, tile
from kernels.tuning import Config, bucket, pick

HEADS_PER_BLOCK = 16
# Stands for an absent upper limit of dt: an infinity does not survive torch.compile's source.
LARGEST = 3.0e38


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


class Call:
    """Shapes, strides and schedule of one call, and the launches for its decays: (B, H, T) fp32."""

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

    @property
    def _slot_table(self) -> Tensor | None:
        return None if self.packing is None else self.packing.slots

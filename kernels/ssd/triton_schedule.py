"""How one call of the Triton scan is cut into chunks, segments and slabs, and its launch settings."""

import functools
import importlib.util
from typing import NamedTuple

import torch
import triton

from kernels.triton_support import INTERPRET
from kernels.tuning import Config

# Chunk states and their gradients that one slab of the backward pass holds: at most this or an eighth of all.
SLAB_BYTES = 128 * 2**20
STATE_ELEMENTS = 16384  # fp32 numbers of state in one program: 64 registers a thread with 8 warps
# Bytes of one head's state that the gradient kernel can hold twice beside its other tiles.
LARGEST_STATE = 96 * 2**10


class Schedule(NamedTuple):
    """chunk: tokens a chunk. block_p: channels a program. Segments of `segment_chunks` cut a row; they run
    side by side if `parallel`, else one after another. The backward pass takes slabs of `slab_chunks`, whole
    segments.
    """

    chunk: int
    block_p: int
    segments: int
    segment_chunks: int
    parallel: bool
    slab_chunks: int

    @property
    def slabs(self) -> int:
        return triton.cdiv(self.segments * self.segment_chunks, self.slab_chunks)


def tile(size: int, element: int) -> int:
    """Smallest tile that holds `size`.

    fp32 tiles of 16 gave illegal shared addresses and wrong results on an H200 with Triton 3.6, and are right
    in the interpreter; tiles of 32 are right there. The cause was not found.
    """
    return max(32 if element == 4 else 16, triton.next_power_of_2(size))


def schedule(
    rows: int,
    length: int,
    heads: int,
    headdim: int,
    d_state: int,
    element: int,
    processors: int,
    segments: int = 0,
) -> Schedule:
    """The rule: rows x heads programs walk whole rows if they fill the processors, otherwise rows are cut
    into as many segments as two programs a processor can hold, of at least 8 chunks each.

    element: bytes of one input element. segments: 0 for the rule; 1 for whole rows; more to force them.
    """
    row_bytes = d_state * element
    # B, C and gradients of a chunk fit a program
    chunk = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
    block_n, block_p = (tile(d, element) for d in (d_state, headdim))
    while block_n * block_p > STATE_ELEMENTS and block_p > 16:
        block_p //= 2
    chunks = triton.cdiv(length, chunk)
    states_bytes = 2 * rows * heads * headdim * d_state * element  # of one chunk of every row
    slab_chunks = max(1, min(chunks, max(SLAB_BYTES // states_bytes, chunks // 8)))
    programs = rows * heads * triton.cdiv(headdim, block_p)
    if segments == 0:
        segments = 1 if programs >= processors else max(1, min(2 * processors // programs, chunks // 8))
    if segments == 1:
        return Schedule(chunk, block_p, triton.cdiv(chunks, slab_chunks), slab_chunks, False, slab_chunks)
    segment_chunks = triton.cdiv(chunks, segments)
    slab_chunks = max(1, slab_chunks // segment_chunks) * segment_chunks
    return Schedule(chunk, block_p, triton.cdiv(chunks, segment_chunks), segment_chunks, True, slab_chunks)


def packed_schedule(length: int, rows: int, headdim: int, d_state: int, element: int) -> Schedule:
    """Of packed sequences, whose lengths only the device knows: one segment, one slab."""
    plan = schedule(1, length, 1, headdim, d_state, element, 1, 1)
    chunks = length // plan.chunk + rows  # at most
    return plan._replace(segments=1, segment_chunks=chunks, slab_chunks=chunks)


def forward_configs(headdim: int, d_state: int, element: int) -> tuple[Config, ...]:
    """Launch settings of the forward kernel, the default first."""
    block_n, block_p = (tile(d, element) for d in (d_state, headdim))
    if element == 4 or block_n * block_p > 8192:
        return (
            Config(num_warps=8, num_stages=1),
            Config(num_warps=8, num_stages=2),
            Config(num_warps=4, num_stages=1),
        )
    return (
        Config(num_warps=4, num_stages=2),
        Config(num_warps=4, num_stages=3),
        Config(num_warps=8, num_stages=2),
    )


def states_configs(headdim: int, d_state: int, element: int) -> tuple[Config, ...]:
    """Launch settings of the states kernel, the default first; BLOCK_N splits a head's state."""
    block_n = tile(d_state, element)
    sizes = sorted({min(block_n, size) for size in (32, 64)}, reverse=True)
    stages = 2 if element == 4 else 3
    return tuple(Config(num_warps=4, num_stages=stages, meta={"BLOCK_N": size}) for size in sizes)


def chunk_gradient_configs(headdim: int, d_state: int, element: int) -> tuple[Config, ...]:
    """Launch settings of the gradient kernel of chunks, the default first."""
    if element == 4 or d_state > 128 or headdim > 64:
        return (Config(num_warps=8, num_stages=1),)
    return (
        Config(num_warps=8, num_stages=1),
        Config(num_warps=8, num_stages=2),
        Config(num_warps=4, num_stages=1),
    )


def group_gradient_configs(headdim: int, d_state: int, element: int) -> tuple[Config, ...]:
    """Launch settings of the gradient kernel of B and C, the default first."""
    block_n = min(128 if element < 4 else 64, tile(d_state, element))
    half = max(tile(1, element), block_n // 2)
    return (
        Config(num_warps=4, num_stages=2, meta={"BLOCK_N": block_n}),
        Config(num_warps=4, num_stages=3, meta={"BLOCK_N": half}),
        Config(num_warps=4, num_stages=3, meta={"BLOCK_N": block_n}),
    )


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; of an H200 where kernels are interpreted or only compiled."""
    if INTERPRET or device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether the kernels written for Hopper can run; so it is taken where kernels are only compiled.

    They need Gluon, which Triton has had since 3.4.
    """
    if INTERPRET or importlib.util.find_spec("triton.experimental") is None:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9

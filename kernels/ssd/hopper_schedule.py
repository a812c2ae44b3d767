"""How one call of the scan on Hopper is cut into segments and slabs, and its launch settings."""

import triton

from kernels.ssd.hopper_tiles import CHANNELS, CHUNK
from kernels.ssd.triton_schedule import SLAB_BYTES, Schedule
from kernels.tuning import Config

SHORTEST_SEGMENT = 8  # chunks
SLAB_SHARE = 16  # of the chunks of a long row, in one slab
# Of a state, in one launch of the gradient kernel: more leave its registers no room.
COLUMNS = 128
GRADIENT_CONFIGS = tuple(Config(num_warps=4, meta={"STAGES": stages}) for stages in (2, 1))


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
    """As `triton_schedule.schedule`. A slab gives every processor a chunk or several for the gradient kernel.

    Where rows are cut, a whole number of segments makes a slab: so many that the states kernel has two
    programs a processor, and the forward kernel as well.
    """
    chunks, programs = triton.cdiv(length, CHUNK), rows * heads * headdim // CHANNELS
    states_bytes = 2 * rows * heads * headdim * d_state * 2  # of one chunk of every row
    wave = max(1, processors // (rows * groups))  # chunks of a row that run at once
    slab = max(SLAB_BYTES // states_bytes, chunks // SLAB_SHARE)
    slab = min(chunks, max(1, round(slab / wave)) * wave)
    if segments == 1 or (segments == 0 and programs >= processors):
        return Schedule(CHUNK, CHANNELS, triton.cdiv(chunks, slab), slab, False, slab)
    if segments == 0:
        parts = max(2 * slab / chunks, 1.0) * processors / programs
        segment = min(max(slab // max(1, round(parts)), SHORTEST_SEGMENT), chunks)
    else:
        segment = triton.cdiv(chunks, segments)
    slab = max(1, slab // segment) * segment
    return Schedule(CHUNK, CHANNELS, triton.cdiv(chunks, segment), segment, True, slab)


def forward_configs(d_state: int) -> tuple[Config, ...]:
    """Launch settings, the default first. A state of more than 128 columns takes the registers of 8 warps."""
    if d_state > 128:
        return (Config(num_warps=8, meta={"STAGES": 2}),)
    return tuple(Config(num_warps=4, meta={"STAGES": stages}) for stages in (2, 3))


def clip_configs(d_state: int) -> tuple[Config, ...]:
    """Launch settings of the walk under state_norm, the default first: it waits for itself, so 8 warps."""
    warps = 8 if d_state > 16 else 4
    return tuple(Config(num_warps=warps, meta={"STAGES": stages}) for stages in (4, 3))


def states_configs(d_state: int) -> tuple[Config, ...]:
    """Launch settings of the states kernel, the default first; BLOCK_N splits a head's state."""
    block_n = min(d_state, 128)
    return (
        Config(num_warps=4, meta={"BLOCK_N": block_n, "STAGES": 2}),
        Config(num_warps=4, meta={"BLOCK_N": block_n, "STAGES": 3}),
        Config(num_warps=4, meta={"BLOCK_N": max(16, block_n // 2), "STAGES": 3}),
    )

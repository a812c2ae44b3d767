"""The rule by which a call on Hopper is cut; nothing here needs such a GPU."""

import pytest

from kernels.ssd.hopper_schedule import hopper_schedule
from kernels.ssd.hopper_tiles import CHUNK
from kernels.ssd.triton_schedule import SLAB_BYTES

PROCESSORS = 132
SHAPES = [  # rows, length, heads, headdim, d_state, groups
    (8, 4096, 32, 64, 128, 1),
    (1, 32768, 32, 64, 128, 1),
    (1, 262144, 32, 64, 128, 1),
    (1, 32768, 80, 64, 128, 8),
    (1, 32768, 32, 64, 256, 1),
    (1, 32768, 16, 128, 16, 1),
    (1, 1, 1, 64, 16, 1),
    (3, 1000, 4, 128, 64, 4),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("segments", [0, 1, 3])
def test_slabs_are_whole_segments_and_cover_a_row(shape: tuple[int, ...], segments: int) -> None:
    rows, length, heads, headdim, d_state, groups = shape
    plan = hopper_schedule(rows, length, heads, headdim, d_state, groups, PROCESSORS, segments)
    chunks = -(-length // CHUNK)
    assert plan.slab_chunks % plan.segment_chunks == 0
    assert (plan.segments - 1) * plan.segment_chunks < chunks <= plan.segments * plan.segment_chunks
    if segments != 0:
        assert plan.parallel == (segments > 1)


@pytest.mark.parametrize("shape", SHAPES[:5])
def test_memory_and_processors(shape: tuple[int, ...]) -> None:
    """A slab is a sixteenth of a long row, 128 MiB, or one chunk a processor, and fills the processors; rows
    that do not are cut."""
    rows, length, heads, headdim, d_state, groups = shape
    plan = hopper_schedule(*shape, PROCESSORS)
    chunks, programs = length // CHUNK, rows * heads * headdim // 64
    states = 2 * rows * heads * headdim * d_state * 2
    wave = -(-PROCESSORS // (rows * groups))
    assert plan.slab_chunks <= max(SLAB_BYTES / states, chunks / 16) * 1.5 + wave
    assert plan.parallel == (programs < PROCESSORS)
    if plan.parallel:
        assert programs * plan.segments >= 1.8 * PROCESSORS

"""Which operators run at which shapes."""

from collections.abc import Sequence

from kernels.benchmarks.ops import OPS, Op
from kernels.benchmarks.shapes import LAYOUTS, Layout, Shape, with_layouts


def chosen(names: Sequence[str], shapes: Sequence[str], layouts: Sequence[str]) -> list[tuple[Op, Shape]]:
    """Every operator at every shape and layout asked for; without shapes, at its own. Raises ValueError."""
    for name in names:
        if name not in OPS:
            raise ValueError(f"ops={name}: choose from [{', '.join(OPS)}]")
    for layout in layouts:
        if layout not in LAYOUTS:
            raise ValueError(f"layouts={layout}: choose from [{', '.join(LAYOUTS)}]")
    parsed = [Shape.parse(text) for text in shapes]
    pairs = []
    for op in (OPS[name] for name in names):
        wanted: list[Layout] = [layout for layout in op.layouts if layout in layouts]
        pairs += [(op, shape) for shape in with_layouts(parsed or op.shapes, wanted)]
    return pairs

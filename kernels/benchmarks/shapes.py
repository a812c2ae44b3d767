"""Shapes that are measured, tuned and compiled, and their notation: `B8 T4096 H32 P64 N128`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

Layout = Literal["contiguous", "sliced"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
_FIELDS = {"B": "batch", "T": "length", "H": "heads", "P": "headdim", "N": "d_state", "G": "groups"}


@dataclass(frozen=True)
class Shape:
    """One layer's sizes. layout: `sliced` inputs are views of one in_proj and one convolution output, as in
    the layer; `contiguous` ones are tensors of their own."""

    batch: int = 1
    length: int = 4096
    heads: int = 32
    headdim: int = 64
    d_state: int = 128
    groups: int = 1
    layout: Layout = "contiguous"

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """`B8 T4096 H24`, blanks optional; the rest is B1 T4096 H32 P64 N128 G1. Raises ValueError."""
        parts = re.findall(r"([BTHPNG])(\d+)", text)
        if not parts or "".join(map("".join, parts)) != text.replace(" ", ""):
            raise ValueError(f"shapes={text}: write sizes as in 'B8 T4096 H32 P64 N128'")
        sizes = {_FIELDS[letter]: int(number) for letter, number in parts}
        if len(sizes) < len(parts) or min(sizes.values()) < 1:
            raise ValueError(f"shapes={text}: every size once, each at least 1")
        shape = cls(**sizes)  # type: ignore[arg-type]
        if shape.heads % shape.groups:
            raise ValueError(f"shapes={text}: G must divide H = {shape.heads}")
        return shape

    def __str__(self) -> str:
        named = [f"{letter}{getattr(self, field)}" for letter, field in _FIELDS.items()]
        return " ".join(named[:-1] if self.groups == 1 else named)

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def d_inner(self) -> int:
        return self.heads * self.headdim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.d_inner + 2 * self.groups * self.d_state

    @property
    def d_in_proj(self) -> int:
        """Row stride of in_proj's output: z, x, B, C, dt."""
        return self.d_inner + self.conv_dim + self.heads

    @property
    def d_model(self) -> int:
        return self.d_inner // 2

    def small(self) -> "Shape":
        """The same kernels on few tokens and heads: what the oracle can follow."""
        return replace(self, batch=2, length=min(self.length, 300), heads=4 * self.groups)

    def alone(self) -> "Shape":
        return replace(self, layout="contiguous")


SCAN = tuple(
    map(
        Shape.parse,
        (
            "B8 T4096",
            "B1 T32768",
            "B1 T262144",
            "B8 T4096 H24",
            "B1 T32768 H80",
            "B1 T32768 N256",
            "B1 T32768 N16",
            "B1 T32768 N64",
            "B1 T32768 H16 P128",
        ),
    )
)
STEP = tuple(Shape(batch=batch, length=1) for batch in (1, 4, 16, 64, 256))
LONG_AND_WIDE = SCAN[:2]
VOCABULARY = 50288  # of the head


def with_layouts(shapes: Sequence[Shape], layouts: Sequence[Layout]) -> list[Shape]:
    return [replace(shape, layout=layout) for shape in shapes for layout in layouts]

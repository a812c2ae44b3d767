"""Compulsory bytes and floating-point operations of each operator, and the time a machine needs for them.

Bytes: every input read once and every output written once, nothing kept in between. FLOPs: matrix products
only, of the chunked algorithm at Q = 64, Q x Q squares in full, C B^T once a group; larger chunks need more.
"""

from dataclasses import dataclass

from kernels.benchmarks.shapes import VOCABULARY, Shape

CHUNK = 64


@dataclass(frozen=True)
class Cost:
    """bytes and matrix-product FLOPs of one call."""

    bytes: int
    flops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Machine:
    """Ceilings measured in the run: bytes/s of a large copy, FLOP/s of a large bf16 matrix product."""

    name: str
    copy: float
    matmul: float

    def limit(self, cost: Cost) -> float:
        """Seconds that no implementation can beat by much: the larger of the two times."""
        return max(cost.bytes / self.copy, cost.flops / self.matmul)


def scan(s: Shape) -> Cost:
    """x, dt, B, C -> y and the final state (fp32). States are built and read (4 P N a token and head), inputs
    mixed within a chunk (2 Q P), C B^T computed once a group."""
    per_head = 4 * s.headdim * s.d_state + 2 * CHUNK * s.headdim
    flops = s.heads * per_head + s.groups * 2 * CHUNK * s.d_state
    read = 2 * (2 * s.d_inner + 2 * s.groups * s.d_state + s.heads)
    return Cost(s.tokens * read + state_bytes(s), s.tokens * flops)


def scan_backward(s: Shape) -> Cost:
    """Reads x, dt, B, C, dy and writes dx, ddt, dB, dC. States are recomputed, their gradients built, and dx,
    dB and dC read them (10 P N a token and head); two products of the mixer (4 Q P); three a group."""
    per_head = 10 * s.headdim * s.d_state + 4 * CHUNK * s.headdim
    flops = s.heads * per_head + s.groups * 6 * CHUNK * s.d_state
    moved = 2 * (3 * s.d_inner + 4 * s.groups * s.d_state + 2 * s.heads)
    return Cost(s.tokens * moved, s.tokens * flops)


def step(s: Shape) -> Cost:
    """The fp32 state is read and written, x, dt, B, C read, y written; no matrix product."""
    vectors = 2 * s.d_inner + 2 * s.groups * s.d_state + s.heads
    return Cost(2 * state_bytes(s) + 2 * s.batch * vectors)


def conv(s: Shape) -> Cost:
    return Cost(2 * 2 * s.tokens * s.conv_dim)


def conv_backward(s: Shape) -> Cost:
    """Reads x and dy, writes dx."""
    return Cost(3 * 2 * s.tokens * s.conv_dim)


def norm(s: Shape) -> Cost:
    return Cost(3 * 2 * s.tokens * s.d_inner)


def norm_backward(s: Shape) -> Cost:
    """Reads x, z and dy, writes dx and dz."""
    return Cost(5 * 2 * s.tokens * s.d_inner)


def add_norm(s: Shape) -> Cost:
    """Reads the stream (fp32) and a branch, writes their sum and its norm."""
    return Cost(2 * (4 + 2) * s.tokens * s.d_model)


def add_norm_backward(s: Shape) -> Cost:
    """Reads the sum and the gradients of both outputs, writes those of stream and branch."""
    return Cost((4 + 4 + 2 + 4 + 2) * s.tokens * s.d_model)


def head(s: Shape) -> Cost:
    """hidden, weight, targets -> a loss (fp32) a token."""
    numbers = (s.tokens + VOCABULARY) * s.d_model
    return Cost(2 * numbers + 12 * s.tokens, 2 * s.tokens * VOCABULARY * s.d_model)


def head_backward(s: Shape) -> Cost:
    """Reads hidden, weight and the gradients of losses, writes those of the first two; logits are there."""
    numbers = (s.tokens + VOCABULARY) * s.d_model
    return Cost(4 * numbers + 12 * s.tokens, 4 * s.tokens * VOCABULARY * s.d_model)


def layer(s: Shape) -> Cost:
    """u -> out, weights read; in_proj, the scan's products, out_proj."""
    weights = s.d_model * (s.d_in_proj + s.d_inner)
    moved = 2 * (2 * s.tokens * s.d_model + weights)
    return Cost(moved, 2 * s.tokens * weights + scan(s).flops)


def layer_backward(s: Shape) -> Cost:
    """Reads u, dout and weights, writes du and the gradients of weights; two products for each of forward."""
    weights = s.d_model * (s.d_in_proj + s.d_inner)
    moved = 2 * (3 * s.tokens * s.d_model + 2 * weights)
    return Cost(moved, 4 * s.tokens * weights + scan_backward(s).flops)


def state_bytes(s: Shape) -> int:
    """One fp32 state of every row."""
    return 4 * s.batch * s.d_inner * s.d_state

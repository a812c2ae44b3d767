"""What both kernels of the convolution do at every token: loads, stores and the sigmoid.

here: whether there is the token, one value or one a segment; channel: which channels there are, all of them
if EVEN; WHOLE: the token is known to be there. What needs no mask gets none.
"""

# mypy: allow-incomplete-defs
import triton
import triton.language as tl

from kernels.triton_support import INTERPRET

_INTERPRET = tl.constexpr(INTERPRET)


@triton.jit
def load(at, here, channel, WHOLE: tl.constexpr, EVEN: tl.constexpr):
    """What lies at `at`, zeros where nothing does."""
    if WHOLE and EVEN:
        v = tl.load(at)
    elif WHOLE:
        v = tl.load(at, mask=channel, other=0.0)
    elif EVEN:
        v = tl.load(at, mask=here, other=0.0)
    else:
        v = tl.load(at, mask=channel & here, other=0.0)
    return v


@triton.jit
def store(at, v, here, channel, WHOLE: tl.constexpr, EVEN: tl.constexpr):
    """v, rounded, to `at`."""
    v = v.to(at.dtype.element_ty)
    if WHOLE and EVEN:
        tl.store(at, v)
    elif WHOLE:
        tl.store(at, v, mask=channel)
    elif EVEN:
        tl.store(at, v, mask=here)
    else:
        tl.store(at, v, mask=channel & here)


@triton.jit
def sigmoid(v):
    """1 / (1 + e^-v) in 4 instructions, to fp32's accuracy.

    Where e^-v is infinity in fp32, the result is 0. Triton's own exponential and division take 9 instructions
    more, for e^-v below 2^-126, which does not change 1, and for results below 2^-126, which are 0 here.
    """
    if _INTERPRET:  # it knows no PTX, and warns of infinity
        s = tl.where(v < -88.0, 0.0, 1.0 / (1.0 + tl.exp2(tl.maximum(v, -88.0) * -1.4426950408889634)))
    else:
        e = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [v * -1.4426950408889634], tl.float32, True, 1
        )
        s = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], tl.float32, True, 1)
    return s

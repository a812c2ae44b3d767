"""What every Triton kernel here shares. Imports triton: only modules that hold kernels import this one."""

import contextlib
import os
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

# Kernels decorated under TRITON_INTERPRET=1 run on the CPU, one program after another.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRET = tl.constexpr(INTERPRET)


@triton.jit
def dot(a, b, acc=None):
    """a @ b (+ acc) in fp32. Half-precision operands go to the tensor cores as they are, fp32 ones as three
    TF32 products, which keeps fp32's accuracy. The interpreter multiplies bf16 bit patterns: upcast there."""
    if _INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision="tf32x3")


@triton.jit
def softplus(v):
    """log(1 + e^v), exact to fp32 everywhere: for small e = e^v a series, as 1 + e rounds e away."""
    e = tl.exp(-tl.abs(v))
    log1p = tl.where(e < 1e-3, e * (1.0 - e * (0.5 - e * 0.33333334)), tl.log(1.0 + e))
    return tl.maximum(v, 0.0) + log1p


def on_device(t: Tensor) -> AbstractContextManager[None]:
    """Launch on the device that holds t, whatever the current one is."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()

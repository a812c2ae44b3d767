"""Run by test_aot.py in a process of its own, without the interpreter: kernels whose fate is known."""

import json
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from kernels.aot import compiled
from kernels.benchmarks.launches import recorded


@triton.jit
def product(a, b, out, stride, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x, y = tl.load(a + i[:, None] * stride + i[None, :]), tl.load(b + i[:, None] * stride + i[None, :])
    tl.store(out + i[:, None] * SIZE + i[None, :], tl.dot(x, y).to(out.dtype.element_ty))


@triton.jit
def staged(a, b, out, steps, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at, total = i[:, None] * SIZE + i[None, :], tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(steps):
        total = tl.dot(tl.load(a + step * SIZE * SIZE + at), tl.load(b + step * SIZE * SIZE + at), total)
    tl.store(out + at, total)


@triton.jit
def wrong(a, SIZE: tl.constexpr):
    tl.store(a + tl.arange(0, SIZE), tl.zeros((2 * SIZE,), tl.float32))


@triton.jit(do_not_specialize=["T"])
def arguments(p, q, none, one, sixteen, seven, big, T, number, flag, SIZE: tl.constexpr):
    pass


def report(kernel: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    with recorded() as launches:
        kernel[(1,)](*args, **kwargs)
        kernel[(1,)](*args, **kwargs)
    (launch,) = launches  # the second is the same specialisation
    done = compiled(launch, "")
    return {"verdict": done.verdict, "registers": done.registers, "shared": done.shared_bytes}


def specialisations() -> list[Any]:
    """How we and Triton's own launcher see one call: types, constants, what is aligned."""
    t = torch.empty(64, dtype=torch.bfloat16)
    args = (t, t[1:], None, 1, 48, 7, 2**40, 32, 0.5, True)
    with recorded() as launches:
        arguments[(1,)](*args, SIZE=16)
    (launch,) = launches
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(arguments.signature, arguments.params, backend)
    bound, specialisation, _ = binder(*args, SIZE=16)
    names = list(bound)
    types = [(name, kind) for name, (kind, _) in zip(names, specialisation, strict=True)]
    aligned = [
        n for n, (kind, mark) in zip(names, specialisation, strict=True) if kind != "constexpr" and mark
    ]
    theirs = [types, aligned, [(n, bound[n]) for n, kind in types if kind == "constexpr"]]
    return [[launch.signature, launch.aligned, launch.constants], theirs]


def main() -> None:
    a, f = torch.empty(2**20, dtype=torch.bfloat16), torch.empty(2**20)
    found = {
        "fits": report(product, a, a, a, 64, SIZE=64, num_warps=4),
        "spills": report(product, f, f, f, 64, SIZE=64, num_warps=1, maxnreg=64),
        "too big": report(staged, a, a, f, 8, SIZE=128, num_warps=8, num_stages=5),
        "wrong": report(wrong, f, SIZE=64),
        "specialisations": specialisations(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

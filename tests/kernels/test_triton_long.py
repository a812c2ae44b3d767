"""Tensors of more than 2^31 elements: every address a kernel makes is 64-bit.

On a CPU in Triton's interpreter, views with so long a step from token to token into a sparse file; on a GPU
at real size.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.conv import causal_conv1d
from kernels.norm import gated_rms_norm
from kernels.ssd import ssd_scan
from kernels.ssd.triton_scan import triton_scan
from kernels.tuning import forced
from tests.kernels.test_triton_scan import check, discretised

CUDA = torch.cuda.is_available()
STEP, TOKENS = 2**24, 150  # elements from token to token: 2.5e9 in all
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


@pytest.fixture
def far(tmp_path: Path) -> Callable[..., Tensor]:
    """Copies a tensor (1, TOKENS, ...) into a view whose tokens lie STEP elements apart."""
    path = tmp_path / "sparse"
    whole = torch.from_numpy(np.memmap(path, dtype=np.float32, mode="w+", shape=(TOKENS * STEP,)))
    used = 0

    def place(t: Tensor) -> Tensor:
        nonlocal used
        inner = t[0, 0].contiguous()
        view = whole[used:].as_strided(t.shape, (TOKENS * STEP, STEP, *inner.stride()))
        used += inner.numel()
        return view.copy_(t)

    return place


def gradients(outputs: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    return [outputs.detach(), *torch.autograd.grad(outputs, leaves, torch.randn_like(outputs))]


def same(run: Callable[..., Tensor], tensors: list[Tensor], place: Callable[..., Tensor]) -> None:
    """Outputs and gradients, bit for bit, whether the tensors are dense or far apart."""
    results = []
    for arrange in (torch.clone, place):
        leaves = [arrange(t).detach().requires_grad_() for t in tensors]
        results.append(gradients(run(*leaves), leaves))
    for i, (dense, apart) in enumerate(zip(*results, strict=True)):
        assert torch.equal(dense, apart), f"result {i}"


@pytest.mark.skipif(CUDA, reason="the interpreter reads this machine's memory")
class TestFarApart:
    def test_scan(self, far: Callable[..., Tensor]) -> None:
        leaves = discretised(1, TOKENS, 2, 16, 1, 16, D="none", initial=False)
        rest = (leaves["log_decay"], leaves["insert"])

        def run(x: Tensor, B: Tensor, C: Tensor) -> Tensor:
            return triton_scan(x, *rest, B, C, None, None, None)[0]

        same(run, [leaves[n] for n in ("x", "B", "C")], far)

    def test_convolution(self, far: Callable[..., Tensor]) -> None:
        weight = torch.randn(6, 4)
        same(lambda x: causal_conv1d(x, weight, backend="triton")[0], [torch.randn(1, TOKENS, 6)], far)

    def test_norm(self, far: Callable[..., Tensor]) -> None:
        def run(x: Tensor, z: Tensor) -> Tensor:
            return gated_rms_norm(x, z, torch.ones(8), eps=1e-5, backend="triton")

        same(run, [torch.randn(1, TOKENS, 8), torch.randn(1, TOKENS, 8)], far)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("d_state", [128, 8], ids=["hopper", "any"])
def test_scan_of_more_than_two_to_the_31_elements(d_state: int, check_close: Any) -> None:
    """The last tokens and their gradients are those of the last piece alone, from the state before it."""
    heads, headdim, piece = 32, 64, 8192
    length = math.ceil(2**31 / (heads * headdim * piece)) * piece + piece
    half = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(1, length, heads, headdim, **half)  # type: ignore[arg-type]
    B, C = (torch.randn(1, length, 1, d_state, **half) for _ in range(2))  # type: ignore[arg-type]
    dt, A = torch.rand(1, length, heads, device="cuda"), -torch.rand(heads, device="cuda")
    assert x.numel() > 2**31

    def run(start: int, stop: int, state: Tensor | None) -> list[Tensor]:
        leaves = [t[:, start:stop].detach().requires_grad_() for t in (x, dt, B, C)]
        own_x, own_dt, own_B, own_C = leaves
        y, final = ssd_scan(own_x, own_dt, A, own_B, own_C, initial_state=state, backend="triton")
        dy = torch.zeros_like(y)
        dy[:, -100:] = 1.0
        return [t[:, -piece:] for t in (y.detach(), *torch.autograd.grad(y, leaves, dy))] + [final.detach()]

    with torch.no_grad():
        _, before = ssd_scan(
            *(t[:, :-piece] for t in (x, dt)), A, *(t[:, :-piece] for t in (B, C)), backend="triton"
        )
    for i, (whole, last) in enumerate(
        zip(run(0, length, None), run(length - piece, length, before), strict=True)
    ):
        check_close(whole, last, 1e-2, f"result {i}")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kernel", ["scan_forward", "states", "chunk_gradient", "group_gradient"])
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize(
    ("headdim", "d_state", "dtype"), [(64, 128, torch.float32), (32, 64, torch.bfloat16)]
)
def test_every_setting_of_the_scan(
    kernel: str, index: int, headdim: int, d_state: int, dtype: torch.dtype, check_close: Any
) -> None:
    with forced(kernel, index):
        check(discretised(1, 300, 4, headdim, 2, d_state), check_close, dtype, segments=2)

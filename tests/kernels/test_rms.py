"""RMSNorm against the formula in float64, in blocks, and its dtypes."""

import pytest
import torch
from torch import Tensor

import kernels.norm.rms
from kernels.norm import rms_norm


def formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x64 = x.double()
    return x64 / (x64.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def run(function: object, x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    y = function(*leaves)  # type: ignore[operator]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize("block", [8, 40, 2**18])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_agrees_with_the_formula(monkeypatch: pytest.MonkeyPatch, block: int, scale: float) -> None:
    monkeypatch.setattr(kernels.norm.rms, "BLOCK_ELEMENTS", block)
    torch.manual_seed(0)
    x, weight, dy = torch.randn(2, 7, 12) * scale, torch.randn(12), torch.randn(2, 7, 12)
    ours = run(lambda x, w: rms_norm(x, w, eps=1e-5), x, weight, dy)
    wanted = run(lambda x, w: formula(x, w, 1e-5), x.double(), weight.double(), dy.double())
    for got, want in zip(ours, wanted, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


def test_result_has_the_dtype_asked_for_and_one_rounding() -> None:
    x, weight = torch.randn(3, 5, 16), torch.randn(16)
    y = rms_norm(x, weight, eps=1e-5, dtype=torch.bfloat16)
    assert torch.equal(y, rms_norm(x, weight, eps=1e-5).bfloat16())
    assert rms_norm(x.bfloat16(), weight, eps=1e-5).dtype == torch.bfloat16


def test_gradients_keep_the_dtypes_of_their_tensors() -> None:
    x, weight = torch.randn(3, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    rms_norm(x, weight, eps=1e-5, dtype=torch.bfloat16).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_channels_must_agree() -> None:
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm(torch.randn(2, 8), torch.ones(4), eps=1e-5)

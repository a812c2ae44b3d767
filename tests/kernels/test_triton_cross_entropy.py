"""The linear head's Triton kernels against PyTorch's cross-entropy in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import tuning
from kernels.cross_entropy import linear_cross_entropy, triton_head

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


def make(
    tokens: int, d: int, vocabulary: int, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], Tensor]:
    shapes = {"hidden": (tokens, d), "weight": (vocabulary, d)}
    leaves = {name: torch.randn(shape, device=DEVICE).to(dtype) for name, shape in shapes.items()}
    leaves["weight"] /= d**0.5
    targets = torch.randint(vocabulary, (tokens,), device=DEVICE)
    targets[0], targets[-1] = 0, vocabulary - 1
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}, targets


def check(leaves: dict[str, Tensor], targets: Tensor, check_close: Any, tolerance: float = TOLERANCE) -> None:
    double = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    losses = linear_cross_entropy(**leaves, targets=targets, backend="triton")
    expected = F.cross_entropy(double["hidden"] @ double["weight"].t(), targets, reduction="none")
    assert losses.dtype == torch.float32
    check_close(losses, expected, tolerance, "losses")
    dlosses = torch.randn_like(losses)
    actual = torch.autograd.grad(losses, list(leaves.values()), dlosses)
    wanted = torch.autograd.grad(expected, list(double.values()), dlosses.double())
    for (name, leaf), a, e in zip(leaves.items(), actual, wanted, strict=True):
        assert a.dtype == leaf.dtype
        check_close(a, e, tolerance, f"gradient of {name}")


@pytest.mark.parametrize("vocabulary", [1, 11, 16, 4097, 9000])
@pytest.mark.parametrize("slice_tokens", [1, 3, 100])
def test_equals_pytorch(
    vocabulary: int, slice_tokens: int, monkeypatch: pytest.MonkeyPatch, check_close: Any
) -> None:
    """Vocabularies that fill no row and no block, slices that do not divide the tokens."""
    monkeypatch.setattr(triton_head, "SLICE_BYTES", slice_tokens * 4 * -(-vocabulary // 16) * 16)
    check(*make(7, 6, vocabulary), check_close)


@pytest.mark.parametrize("index", range(tuning.MOST_CONFIGS))
def test_every_config_equals_pytorch(index: int, check_close: Any) -> None:
    assert len(triton_head.LOSS_CONFIGS) == len(triton_head.GRADIENT_CONFIGS) == tuning.MOST_CONFIGS
    with tuning.forced("head_loss", index), tuning.forced("head_gradient", index):
        check(*make(3, 6, 8200), check_close)


def test_large_logits_do_not_overflow(check_close: Any) -> None:
    leaves, targets = make(9, 6, 40)
    with torch.no_grad():
        leaves["hidden"] *= 1e4
    check(leaves, targets, check_close)


def test_bf16_rounds_logits_once(check_close: Any) -> None:
    leaves, targets = make(7, 6, 40, torch.bfloat16)
    losses = linear_cross_entropy(**leaves, targets=targets, backend="triton")
    rounded = (leaves["hidden"] @ leaves["weight"].t()).double()
    check_close(losses, F.cross_entropy(rounded, targets, reduction="none"), TOLERANCE)
    check(leaves, targets, check_close, 2.0**-6)


def test_autocast_makes_the_products_bf16(check_close: Any) -> None:
    leaves, targets = make(7, 6, 40)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = linear_cross_entropy(**leaves, targets=targets, backend="triton")
        theirs = linear_cross_entropy(**leaves, targets=targets, backend="torch")
    check_close(ours, theirs, TOLERANCE)
    for leaf in leaves.values():
        (a,) = torch.autograd.grad(ours.sum(), leaf, retain_graph=True)
        (e,) = torch.autograd.grad(theirs.sum(), leaf, retain_graph=True)
        assert a.dtype == torch.float32
        check_close(a, e, 2.0**-6)


def test_a_target_that_is_no_id_shows() -> None:
    leaves, targets = make(3, 6, 40)
    targets[1] = 40
    losses = linear_cross_entropy(**leaves, targets=targets, backend="triton")
    assert losses.isnan().tolist() == [False, True, False]


def test_operator_is_well_formed() -> None:
    """Schemas, fake kernels, autograd registration, and tracing with dynamic shapes."""
    leaves, targets = make(5, 6, 11)
    case = (leaves["hidden"], leaves["weight"], targets)
    torch.library.opcheck(torch.ops.longstate.linear_cross_entropy.default, case)
    case = tuple(t.detach() for t in case)
    losses, normalisers = torch.ops.longstate.linear_cross_entropy(*case)
    torch.library.opcheck(
        torch.ops.longstate.linear_cross_entropy_backward.default, (losses, *case, normalisers)
    )


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("index", range(tuning.MOST_CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_sizes_equal_pytorch(index: int, dtype: torch.dtype, check_close: Any) -> None:
    """Two slices and more of a vocabulary that 16 does not divide."""
    leaves, targets = make(6000, 256, 50_280, dtype)
    with tuning.forced("head_loss", index), tuning.forced("head_gradient", index):
        check(leaves, targets, check_close, 1e-4 if dtype == torch.float32 else 2.0**-6)

"""The sliced cross-entropy: PyTorch's value, and logits that never exist in full."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import kernels.cross_entropy.sliced as sliced
from kernels.cross_entropy import Recall, linear_cross_entropy, triton_head

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(*leading: int, d: int = 6, vocabulary: int = 11) -> tuple[dict[str, Tensor], Tensor]:
    leaves = {"hidden": torch.randn(*leading, d), "weight": torch.randn(vocabulary, d)}
    return {n: t.requires_grad_() for n, t in leaves.items()}, torch.randint(vocabulary, leading)


@pytest.mark.parametrize("slice_tokens", [None, 1, 4, 5, 21, 1000])
def test_equals_pytorch(
    slice_tokens: int | None, monkeypatch: pytest.MonkeyPatch, gradients: Any, check_close: Any
) -> None:
    """Also when slices do not divide the tokens, and when one token is more than a slice."""
    leaves, targets = make(3, 7)
    if slice_tokens is not None:
        monkeypatch.setattr(sliced, "SLICE_LOGITS", slice_tokens * 11)
    losses = linear_cross_entropy(leaves["hidden"], leaves["weight"], targets)
    logits = (leaves["hidden"] @ leaves["weight"].t()).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), reduction="none").view(3, 7)
    assert losses.dtype == torch.float32
    check_close(losses, expected, 1e-6)
    expected_grads = gradients((expected,), leaves)
    for name, actual in gradients((losses,), leaves).items():
        check_close(actual, expected_grads[name], 1e-6, name)


def test_large_logits_do_not_overflow(check_close: Any) -> None:
    leaves, targets = make(9)
    losses = linear_cross_entropy(leaves["hidden"] * 1e4, leaves["weight"], targets)
    logits = (leaves["hidden"].double() * 1e4) @ leaves["weight"].double().t()
    check_close(losses, F.cross_entropy(logits, targets, reduction="none"), 1e-6)


@pytest.mark.parametrize("slice_tokens", [None, 4])
def test_bf16_loss_is_fp32(
    slice_tokens: int | None, monkeypatch: pytest.MonkeyPatch, check_close: Any
) -> None:
    """Logits are rounded to bf16 once; soft-max and loss are fp32."""
    leaves, targets = make(3, 7)
    if slice_tokens is not None:
        monkeypatch.setattr(sliced, "SLICE_LOGITS", slice_tokens * 11)
    hidden, weight = (leaves[n].detach().bfloat16().requires_grad_() for n in ("hidden", "weight"))
    losses = linear_cross_entropy(hidden, weight, targets)
    assert losses.dtype == torch.float32
    rounded = (hidden.float() @ weight.float().t()).bfloat16().double()
    check_close(
        losses, F.cross_entropy(rounded.flatten(0, 1), targets.flatten(), reduction="none").view(3, 7), 5e-3
    )
    losses.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recalled_losses_form_no_logits_again(
    backend: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, check_close: Any
) -> None:
    """Within PyTorch's checkpoint: the logits of 21 tokens once forward, once backward, in slices of 7."""
    monkeypatch.setattr(sliced, "SLICE_LOGITS", 7 * 11)
    monkeypatch.setattr(triton_head, "SLICE_BYTES", 7 * 16 * dtype.itemsize)
    leaves, targets = make(3, 7)
    leaves = {name: leaf.detach().to(DEVICE, dtype).requires_grad_() for name, leaf in leaves.items()}
    targets, dlosses = targets.to(DEVICE), torch.rand(3, 7, device=DEVICE)
    results, counts = [], []
    for recall in (None, Recall()):

        def read(hidden: Tensor, weight: Tensor, recall: Recall | None = recall) -> Tensor:
            return linear_cross_entropy(hidden, weight, targets, backend=backend, recall=recall)

        with LogitsFormed(11) as formed:
            losses = checkpoint(read, *leaves.values(), use_reentrant=False)
            results.append([losses, *torch.autograd.grad(losses, list(leaves.values()), dlosses)])
        counts.append(formed.tokens)
    assert counts[0] > counts[1] == 2 * 21
    for again, once in zip(*results, strict=True):
        check_close(again, once, 1e-6 if dtype == torch.float32 else 1e-2)


def test_gradients_of_recalled_losses_have_no_gradients_themselves() -> None:
    """Log-sum-exps of the first pass count as numbers: a second derivative would be wrong, and is refused."""
    leaves, targets = make(3, 7)
    hidden, weight = (leaf.detach().float().requires_grad_() for leaf in leaves.values())
    losses = linear_cross_entropy(hidden, weight, targets, recall=Recall())
    (gradient,) = torch.autograd.grad(losses.square().sum(), [hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class LogitsFormed(TorchDispatchMode):
    """Counts the tokens whose logits are formed: by products whose last dimension is `vocabulary`, or within
    an operator on Triton kernels."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.tokens = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if func.name() == "aten::mm" and out.shape[-1] == self.vocabulary:
            self.tokens += len(out)
        if func.name().startswith("longstate::linear_cross_entropy"):  # forward and backward
            self.tokens += len(args[0])
        return out


class LargestTensor(TorchDispatchMode):
    """Watches the size of every tensor that any operation makes, forward and backward."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.element_size()
            for leaf in tree_leaves(out)
            if _is_tensor(leaf)
        ]
        self.elements = max([self.elements, *sizes])
        return out


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, Tensor)


def test_full_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,096 tokens x 512 ids in slices of 256 tokens: nothing larger than one slice, nor than the inputs."""
    leaves, targets = make(2, 2048, d=8, vocabulary=512)
    monkeypatch.setattr(sliced, "SLICE_LOGITS", 256 * 512)
    with LargestTensor() as watch:
        linear_cross_entropy(leaves["hidden"], leaves["weight"], targets).sum().backward()
    assert watch.elements == 256 * 512
    with LargestTensor() as watch:
        F.cross_entropy((leaves["hidden"] @ leaves["weight"].t()).flatten(0, 1), targets.flatten()).backward()
    assert watch.elements >= 4096 * 512  # the watch sees full logits where they do exist


def test_default_slice_bounds_a_long_input() -> None:
    """As shipped, 64 MiB of fp32 logits a slice, whatever the vocabulary."""
    for vocabulary in (256, 50_280, 262_144):
        assert max(1, sliced.SLICE_LOGITS // vocabulary) * vocabulary * 4 <= 2**26


def test_graph_holds_no_slice_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between forward and backward only the inputs and the losses stay."""
    leaves, targets = make(4096, d=8, vocabulary=512)
    monkeypatch.setattr(sliced, "SLICE_LOGITS", 256 * 512)
    saved: list[int] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t.untyped_storage().nbytes() // t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear_cross_entropy(leaves["hidden"], leaves["weight"], targets)
    assert max(saved, default=0) < 256 * 512

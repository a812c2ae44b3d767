"""Every operator of ours inside PyTorch's checkpoint: segments of long rows are recomputed through it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.conv import causal_conv1d
from kernels.cross_entropy import linear_cross_entropy
from kernels.norm import add_rms_norm, gated_rms_norm, rms_norm
from kernels.ssd import ssd_scan
from kernels.ssd.mitigation import Mitigation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T, H, P, N = 40, 2, 16, 16
MITIGATIONS = {
    "none": None,
    "state_norm": Mitigation(name="state_norm", max_norm=0.5, every=16),
    "sliding_window": Mitigation(name="sliding_window", window=20),
}


def scan(mitigation: Mitigation | None) -> Callable[..., Tensor]:
    def run(x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        A = -torch.arange(1.0, H + 1, device=DEVICE)
        y, _ = ssd_scan(
            x, dt, A, B, C, D=A, dt_softplus=True, mitigation=mitigation, backend="triton", chunk_size=16
        )
        return y

    return run


def head(hidden: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, 32 * P, device=DEVICE).view(32, P)
    return linear_cross_entropy(hidden, weight, torch.arange(T, device=DEVICE)[None] % 32, backend="triton")


TOKENS = [(1, T, H, P), (1, T, H), (1, T, 1, N), (1, T, 1, N)]
CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    **{name: (scan(mitigation), TOKENS) for name, mitigation in MITIGATIONS.items()},
    "conv": (lambda x, w: causal_conv1d(x, w, backend="triton")[0], [(1, T, 6), (6, 4)]),
    "rms_norm": (lambda x, w: rms_norm(x, w, eps=1e-5, backend="triton"), [(1, T, P), (P,)]),
    "gated_norm": (
        lambda x, z, w: gated_rms_norm(x, z, w, eps=1e-5, backend="triton"),
        [(1, T, P), (1, T, P), (P,)],
    ),
    "add_norm": (
        lambda x, d, w: torch.cat(add_rms_norm(x, d, w, eps=1e-5, backend="triton"), -1),
        [(1, T, P), (1, T, P), (P,)],
    ),
    "cross_entropy": (head, [(1, T, P)]),
}


@pytest.mark.parametrize("name", CASES)
def test_recomputed_gradients_equal(name: str) -> None:
    run, shapes = CASES[name]
    given = [torch.randn(shape, device=DEVICE) for shape in shapes]
    results = []
    for recompute in (False, True):
        leaves = [t.clone().requires_grad_() for t in given]
        out = checkpoint(run, *leaves, use_reentrant=False) if recompute else run(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for once, again in zip(*results, strict=True):
        assert torch.equal(once, again)

"""The scan's kernels for Hopper against the oracle: nothing but such a GPU can run them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.ssd import Mitigation, ssd_scan
from kernels.ssd import hopper_schedule as scheduling
from kernels.ssd.triton_scan import triton_scan
from kernels.tuning import forced
from tests.kernels.test_triton_scan import check, discretised

CUDA = torch.cuda.is_available()
HOPPER = CUDA and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]
Close = Callable[..., None]
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("sizes", "dtype", "D", "segments"),
    [  # batch, length, heads, headdim, groups, d_state
        ((2, 1, 2, 64, 1, 128), BF16, "head", 0),
        ((2, 65, 4, 64, 2, 128), FP16, "none", 1),
        ((1, 1000, 3, 64, 3, 128), BF16, "channel", 0),
        ((3, 700, 2, 128, 1, 64), BF16, "head", 3),
        ((1, 300, 8, 128, 2, 16), BF16, "channel", 2),
        ((1, 2500, 2, 64, 1, 32), FP16, "head", 5),
        ((2, 257, 4, 64, 2, 256), BF16, "head", 1),
        ((1, 400, 2, 128, 1, 256), BF16, "head", 2),
    ],
)
@pytest.mark.parametrize("documents", [False, True])
def test_outputs_and_gradients(
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    D: str,
    segments: int,
    documents: bool,
    check_close: Close,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduling, "SLAB_BYTES", 1)  # many slabs
    starts = torch.rand(sizes[:2], device="cuda") < 0.02 if documents else None
    check(discretised(*sizes, D=D, initial=documents), check_close, dtype, starts, segments)


@pytest.mark.parametrize("kernel", ["hopper_forward", "hopper_states", "hopper_gradient"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_every_setting(kernel: str, index: int, check_close: Close) -> None:
    with forced(kernel, index):
        check(discretised(1, 500, 4, 64, 1, 128), check_close, BF16, segments=2)


def test_packed_sequences(check_close: Close) -> None:
    length, heads = 500, 4
    leaves = discretised(1, length, heads, 64, 2, 128, D="none", initial=False)
    cu_seqlens = torch.tensor([0, 3, 67, 131, 260, 500], device="cuda")
    given = {n: leaves[n].to(BF16) for n in ("x", "B", "C")}
    given |= {
        "dt": torch.rand(1, length, heads, device="cuda"),
        "A": -torch.rand(heads, device="cuda"),
        "initial_state": torch.randn(5, heads, 64, 128, device="cuda"),
    }
    results = {}
    for backend in ("naive", "triton"):
        own = {
            n: (t.double() if backend == "naive" else t.clone()).requires_grad_() for n, t in given.items()
        }
        outputs = ssd_scan(**own, cu_seqlens=cu_seqlens, backend=backend)
        torch.manual_seed(1)
        cotangents = [torch.randn(t.shape).to(t) for t in outputs]
        results[backend] = [*outputs, *torch.autograd.grad(outputs, list(own.values()), cotangents)]
    for i, (actual, expected) in enumerate(zip(results["triton"], results["naive"], strict=True)):
        check_close(actual, expected, 1e-2, f"result {i}")


def test_what_follows_a_row_is_not_read() -> None:
    """Tokens behind a sequence's end are NaN in the same tensor: none reaches its outputs or gradients."""
    leaves = discretised(1, 200, 2, 64, 1, 128, D="none", initial=False)
    given = {n: leaves[n].to(BF16) for n in ("x", "B", "C")}
    for t in given.values():
        t[:, 100:] = float("nan")
    own = {n: t.requires_grad_() for n, t in given.items()}
    dt, A = torch.rand(1, 200, 2, device="cuda"), -torch.rand(2, device="cuda")
    cu_seqlens = torch.tensor([0, 100, 200], device="cuda")
    y, final = ssd_scan(own["x"], dt, A, own["B"], own["C"], cu_seqlens=cu_seqlens, backend="triton")
    gradients = torch.autograd.grad(y[:, :100].float().sum() + final[0].sum(), list(own.values()))
    for t in (y, *gradients):
        assert t[:, :100].isfinite().all()
    assert final[0].isfinite().all()


@pytest.mark.parametrize("offset", [0, 8, 3])
def test_slices_of_one_projection(offset: int) -> None:
    """Aligned slices are read in place, others copied: the same numbers."""
    heads, headdim, d_state, length = 2, 64, 64, 150
    width = offset + heads * headdim + 2 * d_state
    whole = torch.randn(2, length, width, device="cuda", dtype=BF16)
    x, B, C = whole[..., offset:].split([heads * headdim, d_state, d_state], -1)
    leaves = discretised(2, length, heads, headdim, 1, d_state, D="none", initial=False)
    views = (x.unflatten(-1, (heads, headdim)), B[:, :, None], C[:, :, None])

    def run(x: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
        return triton_scan(x, leaves["log_decay"], leaves["insert"], B, C, None, None, None)

    for a, e in zip(run(*views), run(*(t.contiguous() for t in views)), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("sizes", "window", "dtype"),
    [  # batch, length, heads, headdim, groups, d_state
        ((2, 700, 4, 64, 2, 128), 128, BF16),
        ((2, 700, 4, 64, 2, 128), 100, BF16),
        ((1, 500, 2, 128, 1, 64), 64, FP16),
        ((1, 640, 2, 64, 1, 256), 192, BF16),
        ((3, 300, 2, 64, 1, 16), 7, BF16),
        ((1, 400, 3, 64, 1, 128), 399, BF16),
        ((1, 9000, 2, 64, 1, 32), 4160, FP16),  # too long for blocks of whole chunks
    ],
)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("past", [False, True])
def test_sliding_window(
    sizes: tuple[int, ...],
    window: int,
    dtype: torch.dtype,
    documents: bool,
    past: bool,
    check_close: Close,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against the chunked scan in fp32, which is held to the oracle elsewhere."""
    monkeypatch.setattr(scheduling, "SLAB_BYTES", 1)  # many slabs
    batch, length, heads = sizes[:3]
    leaves = discretised(*sizes, D="channel", initial=False)
    given = {n: leaves[n].to(dtype) for n in ("x", "B", "C")} | {"D": leaves["D"]}
    given["dt"] = torch.rand(batch, length, heads, device="cuda")
    given["A"] = -4.0 / window * torch.rand(heads, device="cuda")
    starts = torch.rand(batch, length, device="cuda") < 1 / window if documents else None
    mitigation, before = Mitigation("sliding_window", window=window), None
    if past:
        earlier = discretised(*sizes, D="none", initial=False)
        some = {n: earlier[n].to(dtype) for n in ("x", "B", "C")}
        before = ssd_scan(**some, dt=given["dt"], A=given["A"], mitigation=mitigation)[1]
    results = {}
    for backend in ("chunked", "triton"):
        exact = backend == "chunked"
        own = {n: (t.float() if exact else t.clone()).requires_grad_() for n, t in given.items()}
        state = before
        if exact and before is not None:
            state = before._replace(x=before.x.float(), B=before.B.float())
        with monkeypatch.context() as composed:
            if not exact:
                composed.setattr("kernels.ssd.window._blocks_before", None)
            y = ssd_scan(
                **own, document_starts=starts, initial_state=state, mitigation=mitigation, backend=backend
            )[0]
        torch.manual_seed(1)
        cotangent = torch.randn(y.shape).to(y)
        results[backend] = [y, *torch.autograd.grad(y, list(own.values()), cotangent)]
    for name, a, e in zip(("y", *given), results["triton"], results["chunked"], strict=True):
        check_close(a, e, 1.5e-2 if name == "y" else 1e-2, name)  # y is rounded twice


@pytest.mark.parametrize("length", [64, 1000, 5000])
@pytest.mark.parametrize("before", [None, 64])
def test_clipped_states_in_one_kernel(
    length: int, before: int | None, check_close: Close, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = 3
    leaves = discretised(2, length, heads, 64, 1, 128, D="head", initial=True)
    given = {n: leaves[n].to(BF16) for n in ("x", "B", "C")}
    dt, A = torch.rand(2, length, heads, device="cuda"), -0.1 * torch.rand(heads, device="cuda")
    max_norm = torch.tensor([20.0, 60.0, torch.inf], device="cuda")
    mitigation = Mitigation("state_norm", max_norm=max_norm, every=128)
    position = None if before is None else torch.full((2,), before, device="cuda")
    monkeypatch.setattr("kernels.ssd.operators.state_norm", None)  # not composed

    def run(backend: str, scale: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        x, B, C = (scale(given[n]) for n in ("x", "B", "C"))
        return ssd_scan(
            x, dt, A, B, C, D=leaves["D"], initial_state=leaves["initial"], position=position,
            mitigation=mitigation, backend=backend,
        )  # fmt: skip

    y, state = run("triton", lambda t: t)
    expected_y, expected_state = run("naive", torch.Tensor.double)
    check_close(y, expected_y, 1e-2, "y")
    check_close(state, expected_state, 1e-2, "state")
    assert torch.linalg.vector_norm(state, dim=(2, 3))[:, 2].min() > 60


def test_twice_the_same_bits() -> None:
    leaves = discretised(2, 400, 8, 64, 1, 128)
    order = ("x", "log_decay", "insert", "B", "C", "D", "initial")
    results = []
    for _ in range(2):
        own = [leaves[n].to(BF16 if n in "xBC" else torch.float32).requires_grad_() for n in order]
        y, final = triton_scan(*own, None)
        results.append([y, final, *torch.autograd.grad(y.float().sum() + final.sum(), own)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)

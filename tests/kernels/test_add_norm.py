"""The addition fused with the norm behind it, against the sum and the formula in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import tuning
from kernels.norm import add_rms_norm, rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EPS = 1e-5
# Measured: 5e-7. What is rounded to bf16 is truncated by the interpreter: one unit of the last of 8 bits.
TOLERANCE = {F32: 1e-5, BF16: 2.0**-7, F16: 2.0**-10}
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
BACKENDS = ("torch", "triton")


def make(*shape: int, residual: torch.dtype = F32, branch: torch.dtype = BF16) -> dict[str, Tensor]:
    leaves = {
        "residual": torch.randn(shape, device=DEVICE).to(residual),
        "branch": torch.randn(shape, device=DEVICE).to(branch),
        "weight": torch.randn(shape[-1:], device=DEVICE),
    }
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def formula(residual: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + branch
    return total, total / (total.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def gradients(outputs: tuple[Tensor, Tensor], leaves: dict[str, Tensor], given: str) -> dict[str, Any]:
    """From a fixed gradient of the outputs named, the other's absent."""
    cotangents = [torch.linspace(-1, 2, t.numel(), device=DEVICE).view(t.shape).to(t.dtype) for t in outputs]
    some = slice(*{"both": (0, 2), "sum": (0, 1), "norm": (1, 2)}[given])
    found = torch.autograd.grad(outputs[some], list(leaves.values()), cotangents[some], allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def check(leaves: dict[str, Tensor], given: str, backend: Any, check_close: Any, **options: Any) -> None:
    double = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    ours, wanted = add_rms_norm(**leaves, eps=EPS, backend=backend, **options), formula(**double)
    assert [t.dtype for t in ours] == [leaves["residual"].dtype, options.get("dtype") or ours[0].dtype]
    narrow = max(TOLERANCE[t.dtype] for t in ours)
    check_close(ours[0], wanted[0], TOLERANCE[ours[0].dtype], "sum")
    check_close(ours[1], wanted[1], narrow, "norm")
    expected_gradients = gradients(wanted, double, given)
    for name, gradient in gradients(ours, leaves, given).items():
        if given == "sum" and name == "weight":
            assert gradient is None
            continue
        assert gradient.dtype == leaves[name].dtype
        tolerance = max(narrow, TOLERANCE[gradient.dtype])
        check_close(gradient, expected_gradients[name], tolerance, f"gradient of {name}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", ["both", "sum", "norm"])
@pytest.mark.parametrize("shape", [(1, 8), (2, 31, 20), (5, 1, 3), (65, 12)])
def test_equals_the_formula(shape: tuple[int, ...], given: str, backend: str, check_close: Any) -> None:
    """A stream in fp32, a branch in bf16; gradients of both outputs, or of one alone."""
    check(make(*shape), given, backend, check_close)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("residual", "branch", "dtype"),
    [(F32, F32, None), (F32, BF16, BF16), (F32, F16, F16), (BF16, BF16, None), (BF16, BF16, F32)],
)
def test_dtypes(residual: Any, branch: Any, dtype: Any, backend: str, check_close: Any) -> None:
    leaves = make(3, 4, 24, residual=residual, branch=branch)
    check(leaves, "both", backend, check_close, dtype=dtype)


@pytest.mark.parametrize("index", range(tuning.MOST_CONFIGS))
def test_every_config_equals_the_formula(index: int, check_close: Any) -> None:
    """More tokens than one program takes at a time."""
    with tuning.forced("norm_forward", index), tuning.forced("norm_backward", index):
        check(make(5, 1100), "both", "triton", check_close)


def test_without_a_gpu_it_is_the_sum_and_the_norm_bit_for_bit() -> None:
    leaves = {name: leaf.detach().cpu().requires_grad_() for name, leaf in make(2, 31, 20).items()}
    ours = add_rms_norm(**leaves, eps=EPS, dtype=BF16)
    total = leaves["residual"] + leaves["branch"]
    plain = total, rms_norm(total, leaves["weight"], eps=EPS, dtype=BF16)
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(
        *(torch.autograd.grad([*t], [*leaves.values()], [*t]) for t in (ours, plain)), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("how", ["slices", "transposed", "strided channels", "expanded gradient"])
def test_inputs_that_are_not_contiguous(how: str) -> None:
    """As packed copies, bit for bit."""
    wide, branch, weight = torch.randn(3, 4, 19), torch.randn(3, 4, 13).bfloat16(), torch.randn(6)

    def run(packed: bool) -> tuple[Tensor, ...]:
        leaves = [t.to(DEVICE).requires_grad_() for t in (wide, branch, weight)]
        seen = [leaves[0][..., 1:7], leaves[1][..., :6]]
        if how == "transposed":
            seen = [t.transpose(0, 1) for t in seen]
        elif how == "strided channels":
            seen = [leaves[0][..., 1:18:3], leaves[1][..., 1:13:2]]
        if packed:
            seen = [t.contiguous() for t in seen]
        total, y = add_rms_norm(*seen, leaves[2], eps=EPS, backend="triton")
        loss = total.sum() + y.sum() if how == "expanded gradient" else (total * y).sum()
        return total, y, *torch.autograd.grad(loss, leaves)

    for a, b in zip(run(False), run(True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_tokens(shape: tuple[int, ...], backend: Any) -> None:
    leaves = make(*shape)
    total, y = add_rms_norm(**leaves, eps=EPS, dtype=BF16, backend=backend)
    assert (total.shape, y.shape, total.dtype, y.dtype) == (shape, shape, F32, BF16)
    (total.sum() + y.sum()).backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves.values())


@pytest.mark.parametrize("branch", [F32, BF16])
def test_operator_is_well_formed(branch: torch.dtype) -> None:
    """Schemas, fake kernels, autograd registration, and tracing with dynamic shapes."""
    leaves = make(2, 3, 8, branch=branch)
    case = (*leaves.values(), EPS, F32)
    torch.library.opcheck(torch.ops.longstate.add_rms_norm.default, case)
    with torch.no_grad():
        total, y, inverse = torch.ops.longstate.add_rms_norm(*case)
    for dtotal in (None, total.clone()):
        backward = (y, dtotal, total, leaves["weight"].detach(), inverse, branch)
        torch.library.opcheck(torch.ops.longstate.add_rms_norm_backward.default, backward)


@pytest.mark.parametrize("given", ["both", "sum", "norm"])
def test_compiles_without_graph_breaks(given: str) -> None:
    leaves = make(2, 3, 8)

    def loss(leaves: dict[str, Tensor]) -> Tensor:
        total, y = add_rms_norm(**leaves, eps=EPS, backend="triton")
        return {"both": (total * y).sum(), "sum": total.square().sum(), "norm": y.square().sum()}[given]

    compiled, tensors = torch.compile(loss, fullgraph=True, backend="aot_eager"), list(leaves.values())
    ours = torch.autograd.grad(compiled(leaves), tensors, materialize_grads=True)
    for a, e in zip(ours, torch.autograd.grad(loss(leaves), tensors, materialize_grads=True), strict=True):
        assert torch.allclose(a, e)


def test_saved_tensors_are_read_once() -> None:
    """As PyTorch's checkpoint requires; nothing is kept but the sum, the weight and a number a token."""
    leaves, packed, unpacked = make(3, 8), [], []

    def unpack(t: Tensor) -> Tensor:
        unpacked.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, unpack):
        total, y = add_rms_norm(**leaves, eps=EPS, backend="triton")
    torch.autograd.grad((total, y), list(leaves.values()), (total.detach(), y.detach()))
    assert sorted(t.numel() for t in packed) == [3, 8, 24]
    assert len(unpacked) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"branch": torch.zeros(2, 4)}, r"shapes \(3, 4\), \(2, 4\), \(4,\)"),
        ({"weight": torch.ones(5)}, r"shapes \(3, 4\), \(3, 4\), \(5,\)"),
        ({"residual": torch.zeros(3, 4).bfloat16()}, "branch is torch.float32: must not be wider than"),
        ({"residual": torch.zeros(3, 4).double()}, "residual is torch.float64: the Triton norm takes"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Tensor], said: str) -> None:
    given = {"residual": torch.zeros(3, 4), "branch": torch.zeros(3, 4), "weight": torch.ones(4)} | change
    with pytest.raises(ValueError, match=said):
        add_rms_norm(**given, eps=EPS, backend="triton")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("index", range(tuning.MOST_CONFIGS))
@pytest.mark.parametrize(("tokens", "channels"), [(33_000, 1024), (5000, 2560), (999, 8192)])
def test_real_sizes_equal_the_formula(tokens: int, channels: int, index: int, check_close: Any) -> None:
    """Twice the same, bit for bit."""
    leaves = make(tokens, channels)
    with tuning.forced("norm_forward", index), tuning.forced("norm_backward", index):
        check(leaves, "both", None, check_close, dtype=BF16)
        runs = []
        for _ in range(2):
            outputs = add_rms_norm(**leaves, eps=EPS, dtype=BF16)
            runs.append((*outputs, *gradients(outputs, leaves, "both").values()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_a_long_input_equals_its_end() -> None:
    """1,100,000 tokens of 2,048 channels: beyond 2^31 elements."""
    residual = torch.zeros(1_100_000, 2048, device="cuda", dtype=BF16)
    branch, weight = torch.zeros_like(residual), torch.randn(2048, device="cuda")
    for t in (residual, branch):
        t[-100:].normal_()

    def run(tokens: int) -> list[Tensor]:
        leaves = [t[-tokens:].detach().requires_grad_() for t in (residual, branch)]
        total, y = add_rms_norm(*leaves, weight, eps=EPS)
        found = torch.autograd.grad((total, y), leaves, (y.detach(), total.detach()))
        return [t[-100:] for t in (total, y, *found)]

    for whole, end in zip(run(1_100_000), run(100), strict=True):
        assert torch.equal(whole, end)

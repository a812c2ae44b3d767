"""The norms' Triton kernels against the formula in float64: on a GPU, else in Triton's interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import tuning
from kernels.norm import gated_rms_norm, naive_gated_rms_norm, rms_norm
from kernels.norm.triton_norm import BACKWARD_CONFIGS, FORWARD_CONFIGS, launch_backward, launch_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5  # fp32 against float64; measured: 5e-7
# Truncated by the interpreter, rounded on a GPU: one unit of the last of 8 or 11 bits.
HALF = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
OPTIONS = ("plain", "after", "before")  # no gate, the norm after it, the norm before it


def make(gate: str, *shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Tensor arguments that record gradients; the weight stays in fp32."""
    leaves = {"x": torch.randn(shape, device=DEVICE).to(dtype)}
    if gate != "plain":
        leaves["z"] = torch.randn(shape, device=DEVICE).to(dtype)
    leaves["weight"] = torch.randn(shape[-1:], device=DEVICE)
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def norm(gate: str, leaves: dict[str, Tensor], n_groups: int = 1, **options: Any) -> Tensor:
    if gate == "plain":
        return rms_norm(**leaves, eps=1e-5, **options)
    before = gate == "before"
    return gated_rms_norm(**leaves, eps=1e-5, n_groups=n_groups, norm_before_gate=before, **options)


def formula(gate: str, leaves: dict[str, Tensor], n_groups: int = 1) -> Tensor:
    if gate == "plain":
        x = leaves["x"]
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * leaves["weight"]
    return naive_gated_rms_norm(**leaves, eps=1e-5, n_groups=n_groups, norm_before_gate=gate == "before")


def check(
    gate: str, leaves: dict[str, Tensor], check_close: Any, n_groups: int = 1, tolerance: float = TOLERANCE
) -> None:
    """Output and every gradient, for a random cotangent."""
    double = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    y, expected = norm(gate, leaves, n_groups, backend="triton"), formula(gate, double, n_groups)
    assert y.dtype == leaves["x"].dtype
    check_close(y, expected, tolerance, "y")
    dy = torch.randn_like(y)
    actual = torch.autograd.grad(y, list(leaves.values()), dy)
    wanted = torch.autograd.grad(expected, list(double.values()), dy.double())
    for (name, leaf), a, e in zip(leaves.items(), actual, wanted, strict=True):
        assert a.dtype == leaf.dtype
        check_close(a, e, tolerance, f"gradient of {name}")


@pytest.mark.parametrize("gate", OPTIONS)
@pytest.mark.parametrize(
    ("shape", "n_groups"), [((1, 8), 1), ((3, 12), 3), ((2, 31, 20), 2), ((65, 48), 4), ((5, 1, 2), 1)]
)
def test_equals_the_formula(shape: tuple[int, ...], n_groups: int, gate: str, check_close: Any) -> None:
    """Channels that fill no block, groups, one token and many."""
    check(gate, make(gate, *shape), check_close, 1 if gate == "plain" else n_groups)


@pytest.mark.parametrize("gate", OPTIONS)
@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_small_and_large_inputs(scale: float, gate: str, check_close: Any) -> None:
    """Where x is large its gradient vanishes by cancellation: errors are relative to the terms, dy / |x|."""
    leaves = make(gate, 7, 24)
    with torch.no_grad():
        leaves["x"] *= scale
    double = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    y, expected = norm(gate, leaves, backend="triton"), formula(gate, double)
    check_close(y, expected, TOLERANCE)
    for name, leaf in leaves.items():
        (actual,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected.sum(), double[name], retain_graph=True)
        floor = leaf.numel() ** 0.5 / (max(scale, 1e-2) if name == "x" else 1.0)
        check_close(actual, wanted, TOLERANCE, name, floor=floor)


@pytest.mark.parametrize("gate", OPTIONS)
@pytest.mark.parametrize("index", range(tuning.MOST_CONFIGS))
def test_every_config_equals_the_formula(index: int, gate: str, check_close: Any) -> None:
    """More tokens than one program takes at a time."""
    assert len(FORWARD_CONFIGS) == len(BACKWARD_CONFIGS) == tuning.MOST_CONFIGS
    with tuning.forced("norm_forward", index), tuning.forced("norm_backward", index):
        check(gate, make(gate, 5, 1100), check_close)


def test_a_program_takes_several_turns(monkeypatch: pytest.MonkeyPatch, check_close: Any) -> None:
    """10 tokens of 2 groups, 3 programs a group at most: 4 turns, the last program's partly empty."""
    config = tuning.Config(num_warps=4, meta={"TILE": 8, "PROGRAMS": 6})
    monkeypatch.setattr("kernels.norm.triton_norm.BACKWARD_CONFIGS", (config,))
    check("after", make("after", 10, 16), check_close, n_groups=2)


@pytest.mark.parametrize("gate", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype, gate: str, check_close: Any) -> None:
    check(gate, make(gate, 3, 40, dtype=dtype), check_close, tolerance=HALF[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_result_has_the_dtype_asked_for(dtype: torch.dtype, check_close: Any) -> None:
    leaves = make("plain", 3, 16)
    y = norm("plain", leaves, dtype=dtype, backend="triton")
    assert y.dtype == dtype
    check_close(y, norm("plain", leaves, backend="torch"), HALF.get(dtype, TOLERANCE))
    gradients = torch.autograd.grad(y.sum(), list(leaves.values()))
    assert all(g.dtype == torch.float32 for g in gradients)


@pytest.mark.parametrize("how", ["slice of a projection", "transposed", "strided channels"])
def test_inputs_that_are_not_contiguous(how: str) -> None:
    """The gate as a slice of in_proj's output, tokens or channels in another order: as a packed copy."""
    x, projected, weight = torch.randn(3, 4, 6), torch.randn(3, 4, 17), torch.randn(6)

    def run(packed: bool) -> tuple[Tensor, ...]:
        leaves = [t.to(DEVICE).requires_grad_() for t in (x, projected, weight)]
        seen, z = leaves[0], leaves[1][..., :6]
        if how == "transposed":
            seen, z = seen.transpose(0, 1), z.transpose(0, 1)
        elif how == "strided channels":
            z = leaves[1][..., 1:13:2]
        if packed:
            seen, z = seen.contiguous(), z.contiguous()
        y = gated_rms_norm(seen, z, leaves[2], eps=1e-5, n_groups=2, backend="triton")
        return y, *torch.autograd.grad(y.sum(), leaves)

    for a, b in zip(run(False), run(True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gate", ["after", "before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "n_groups"), [((2, 9, 7), 1), ((2, 31, 20), 2), ((33, 9), 3)])
def test_backward_writes_where_it_is_told(
    shape: tuple[int, ...], n_groups: int, dtype: torch.dtype, gate: str, check_close: Any
) -> None:
    """dz in a slice of a wider buffer, nothing beside it touched; y again, as far as a GPU rounds alike."""
    before, channels = gate == "before", shape[-1]
    x, z, dy = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(3))
    weight = torch.randn(channels, device=DEVICE)
    y, inverse = launch_forward(x, z, weight, 1e-5, n_groups, before, dtype)
    case = (dy, x, z, weight, inverse, n_groups, before)
    wanted = launch_backward(*case)
    wide = torch.full((*shape[:-1], channels + 8), 7.0, device=DEVICE, dtype=dtype)
    dz, again = wide[..., 3 : 3 + channels], torch.empty_like(y)
    given = launch_backward(*case, dz=dz, y=again)
    check_close(again, y, HALF.get(dtype, 1e-6), "y again")
    assert given[1] is dz
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))
    assert (wide[..., :3] == 7).all()
    assert (wide[..., 3 + channels :] == 7).all()


@pytest.mark.parametrize("gate", OPTIONS)
def test_operator_is_well_formed(gate: str) -> None:
    """Schemas, fake kernels, autograd registration, and tracing with dynamic shapes."""
    leaves = make(gate, 2, 3, 8)
    x, z, weight = leaves["x"], leaves.get("z"), leaves["weight"]
    case = (x, z, weight, 1e-5, 1, gate == "before", torch.float32)
    torch.library.opcheck(torch.ops.longstate.rms_norm.default, case)
    y, inverse = (t.detach() for t in torch.ops.longstate.rms_norm(*case))
    x, z, weight = (None if t is None else t.detach() for t in (x, z, weight))
    torch.library.opcheck(
        torch.ops.longstate.rms_norm_backward.default, (y, x, z, weight, inverse, 1, gate == "before")
    )


@pytest.mark.parametrize("gate", OPTIONS)
def test_compiles_without_graph_breaks(gate: str) -> None:
    leaves = make(gate, 2, 3, 8)

    def loss(leaves: dict[str, Tensor]) -> Tensor:
        return norm(gate, leaves, backend="triton").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, e in zip(
        torch.autograd.grad(compiled(leaves), list(leaves.values())),
        torch.autograd.grad(loss(leaves), list(leaves.values())),
        strict=True,
    ):
        assert torch.allclose(a, e)


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x is torch.float64: .* float32, bfloat16 and float16"):
        rms_norm(torch.zeros(2, 4, dtype=torch.float64), torch.ones(4), eps=1e-5, backend="triton")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("gate", OPTIONS)
@pytest.mark.parametrize("index", range(tuning.MOST_CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "channels", "n_groups"), [(33_000, 2048, 1), (5000, 2560, 8), (999, 8192, 1)]
)
def test_real_sizes_equal_the_formula(
    tokens: int, channels: int, n_groups: int, dtype: torch.dtype, index: int, gate: str, check_close: Any
) -> None:
    """Twice the same, bit for bit."""
    leaves = make(gate, tokens, channels, dtype=dtype)
    groups = 1 if gate == "plain" else n_groups
    with tuning.forced("norm_forward", index), tuning.forced("norm_backward", index):
        check(gate, leaves, check_close, groups, HALF.get(dtype, TOLERANCE))
        runs = []
        for _ in range(2):
            y = norm(gate, leaves, groups)
            runs.append((y, *torch.autograd.grad(y, list(leaves.values()), y.detach())))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_a_long_input_equals_its_end() -> None:
    """600,000 tokens, the gate in rows of 4,384: beyond 2^31 elements."""
    projected = torch.zeros(600_000, 4384, device="cuda", dtype=torch.bfloat16)
    x = torch.zeros(600_000, 2048, device="cuda", dtype=torch.bfloat16)
    for t in (x, projected):
        t[-100:].normal_()
    weight = torch.randn(2048, device="cuda")

    def run(tokens: int) -> list[Tensor]:
        leaves = [t[-tokens:].detach().requires_grad_() for t in (x, projected[:, :2048])]
        y = gated_rms_norm(*leaves, weight, eps=1e-5)
        return [t[-100:] for t in (y, *torch.autograd.grad(y, leaves, y.detach()))]

    for whole, end in zip(run(600_000), run(100), strict=True):
        assert torch.equal(whole, end)

"""The convolution's Triton kernels against the oracle: on a GPU, else in Triton's interpreter."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import tuning
from kernels.conv import causal_conv1d, naive_causal_conv1d, triton_conv
from kernels.conv.triton_conv import BACKWARD_CONFIGS, FORWARD_CONFIGS, triton_causal_conv1d

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5  # fp32 against float64; measured: 1e-6
# Truncated by the interpreter, rounded on a GPU: one unit of the last of 8 or 11 bits.
HALF = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels walk along segments, in the interpreter slowly: a quarter as far, there.

    So inputs have more segments, and more borders between them. The configs imported here are the real ones.
    """
    if DEVICE == "cpu":
        for name, configs in (("FORWARD_CONFIGS", FORWARD_CONFIGS), ("BACKWARD_CONFIGS", BACKWARD_CONFIGS)):
            short = [replace(config, meta=config.meta | {"SEGMENT": 16}) for config in configs]
            monkeypatch.setattr(triton_conv, name, tuple(short))


def make(
    batch: int, length: int, channels: int = 6, width: int = 4, rows: int | None = None, optional: bool = True
) -> dict[str, Tensor]:
    """Tensor arguments that record gradients; `optional`: bias and initial_state too."""
    shapes: dict[str, tuple[int, ...]] = {"x": (batch, length, channels), "weight": (channels, width)}
    if optional:
        shapes |= {"bias": (channels,), "initial_state": (rows or batch, channels, width - 1)}
    return {name: torch.randn(shape, device=DEVICE).requires_grad_() for name, shape in shapes.items()}


def cast(leaves: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}


def starts_of(batch: int, length: int, chance: float) -> Tensor:
    return torch.rand(batch, length, device=DEVICE) < chance


def compare(
    ours: tuple[Tensor, ...],
    leaves: dict[str, Tensor],
    oracle: tuple[Tensor, ...],
    double: dict[str, Tensor],
    check_close: Any,
    tolerance: float = TOLERANCE,
) -> None:
    """Outputs and every gradient, for random cotangents."""
    cotangents = [torch.randn_like(o) for o in ours]
    actual = torch.autograd.grad(ours, list(leaves.values()), cotangents)
    expected = torch.autograd.grad(
        oracle, list(double.values()), [c.to(o) for c, o in zip(cotangents, oracle, strict=True)]
    )
    names = ["y", "state", *(f"gradient of {name}" for name in leaves)]
    for name, a, e in zip(names, (*ours, *actual), (*oracle, *expected), strict=True):
        check_close(a, e, tolerance, name, floor=1e-2)


def check_against_oracle(
    leaves: dict[str, Tensor], check_close: Any, dtype: torch.dtype = torch.float32, **options: Any
) -> None:
    leaves = cast(leaves, dtype)
    double = cast(leaves, torch.float64)
    ours = causal_conv1d(**leaves, **options, backend="triton")
    assert ours[0].dtype == ours[1].dtype == dtype
    oracle = naive_causal_conv1d(**double, **options)
    compare(ours, leaves, oracle, double, check_close, HALF.get(dtype, TOLERANCE))


@pytest.mark.parametrize("chance", [None, 0.2, 1.0])
@pytest.mark.parametrize(("length", "width"), [(1, 4), (2, 3), (3, 4), (15, 2), (31, 4), (65, 3)])
def test_equals_the_oracle(length: int, width: int, chance: float | None, check_close: Any) -> None:
    """Lengths around the blocks' and the kernel's; documents nowhere, here and there, everywhere."""
    starts = None if chance is None else starts_of(2, length, chance)
    check_against_oracle(make(2, length, width=width), check_close, document_starts=starts)


@pytest.mark.parametrize("activation", [False, True])
def test_without_bias_and_state(activation: bool, check_close: Any) -> None:
    check_against_oracle(make(1, 7, optional=False), check_close, activation=activation)


@pytest.mark.parametrize("index", range(tuning.MOST_CONFIGS))
def test_every_config_equals_the_oracle(
    index: int, check_close: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_conv, "FORWARD_CONFIGS", FORWARD_CONFIGS)
    monkeypatch.setattr(triton_conv, "BACKWARD_CONFIGS", BACKWARD_CONFIGS)
    assert len(FORWARD_CONFIGS) == len(BACKWARD_CONFIGS) == tuning.MOST_CONFIGS
    with tuning.forced("conv_forward", index), tuning.forced("conv_backward", index):
        check_against_oracle(make(2, 70, channels=131), check_close, document_starts=starts_of(2, 70, 0.1))


@pytest.mark.parametrize(
    ("channels", "width", "documents"),
    [(128, 4, None), (128, 4, (70,)), (132, 4, (0, 16, 70, 131)), (256, 3, (131,)), (128, 5, (70,))],
)
def test_segments_inside_a_row_and_a_document_equal_the_oracle(
    channels: int, documents: tuple[int, ...] | None, width: int, check_close: Any
) -> None:
    """Those are walked without masks: by the backward kernel 4 together, of its first 4 none, up to width 4.

    Channels fill the blocks or not. Documents begin in some segments, at their first token and just before.
    """
    length = 212 if DEVICE == "cpu" else 800
    starts = None
    if documents is not None:
        starts = torch.zeros(1, length, dtype=torch.bool, device=DEVICE)
        starts[:, list(documents)] = True
    check_against_oracle(make(1, length, channels=channels, width=width), check_close, document_starts=starts)


def test_extreme_sums_give_zero_or_themselves(check_close: Any) -> None:
    """The sigmoid keeps fp32's accuracy from end to end; far out it is 0 or 1, its gradient too."""
    far = torch.tensor([-1e30, -1e4, -200.0, 200.0, 1e4, 1e30], device=DEVICE)
    x = torch.cat([torch.linspace(-80, 80, 1000, device=DEVICE), far])[None, :, None].requires_grad_()
    weight = torch.tensor([[0.0, 1.0]], device=DEVICE)
    y, _ = causal_conv1d(x, weight, backend="triton")
    (slope,) = torch.autograd.grad(y.sum(), x)
    double = x.detach().double().requires_grad_()
    expected = torch.nn.functional.silu(double)
    (expected_slope,) = torch.autograd.grad(expected.sum(), double)
    error = (y.double() / expected - 1)[0, :1000, 0].abs()  # linspace meets no zero
    # e^-x multiplies the rounding of x; 1 - sigmoid, which the slope multiplies by x, is rounded like 1.
    assert error.max() < 2e-5
    assert error[x[0, :1000, 0].abs() < 10].max() < 2e-6
    check_close(slope[:, :1000], expected_slope[:, :1000], 3e-6)
    assert torch.equal(y[0, 1000:, 0], far.clamp(min=0))
    assert torch.equal(slope[0, 1000:, 0], (far > 0).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_inputs_and_outputs_only(dtype: torch.dtype, check_close: Any) -> None:
    check_against_oracle(make(2, 33), check_close, dtype, document_starts=starts_of(2, 33, 0.1))


@pytest.mark.parametrize("chance", [None, 0.2])
@pytest.mark.parametrize("borders", [[0, 1, 3, 6, 70], [0, 64, 66, 67, 131], [0, 5]])
def test_packed_sequences_equal_each_alone(
    borders: list[int], chance: float | None, check_close: Any
) -> None:
    """One state a sequence, shorter ones than the kernel among them; document starts inside."""
    length = borders[-1]
    starts = None if chance is None else starts_of(1, length, chance)
    leaves = make(1, length, rows=len(borders) - 1)
    double = cast(leaves, torch.float64)
    cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=DEVICE)
    ours = causal_conv1d(**leaves, document_starts=starts, cu_seqlens=cu_seqlens, backend="triton")
    compare(ours, leaves, packed_oracle(double, starts, borders), double, check_close)
    torch_backend = causal_conv1d(**leaves, document_starts=starts, cu_seqlens=cu_seqlens, backend="torch")
    compare(torch_backend, leaves, packed_oracle(double, starts, borders), double, check_close)


def packed_oracle(double: dict[str, Tensor], starts: Tensor | None, borders: list[int]) -> tuple[Tensor, ...]:
    pieces = [
        naive_causal_conv1d(
            double["x"][:, start:stop],
            double["weight"],
            double["bias"],
            initial_state=double["initial_state"][row : row + 1],
            document_starts=None if starts is None else starts[:, start:stop],
        )
        for row, (start, stop) in enumerate(itertools.pairwise(borders))
    ]
    return tuple(torch.cat(part, dim) for dim, part in zip((1, 0), zip(*pieces, strict=True), strict=True))


def test_an_empty_sequence_hands_its_state_on(check_close: Any) -> None:
    """Borders on a GPU are not checked: equal ones are a sequence of no tokens."""
    leaves = make(1, 70, rows=3)
    before = leaves["initial_state"].transpose(1, 2)
    cu_seqlens = torch.tensor([0, 0, 70, 70], device=DEVICE)
    y, tail = triton_causal_conv1d(
        leaves["x"], before, leaves["weight"], leaves["bias"], None, cu_seqlens, True
    )
    alone = causal_conv1d(**{**leaves, "initial_state": leaves["initial_state"][1:2]}, backend="torch")
    check_close(y, alone[0], TOLERANCE)
    assert torch.equal(tail[0], before[0])
    assert torch.equal(tail[2], before[2])
    assert torch.equal(tail[1:2], alone[1].transpose(1, 2))
    (gradient,) = torch.autograd.grad(tail.sum(), leaves["initial_state"])
    assert gradient[0].eq(1).all()
    assert gradient[1].eq(0).all()
    assert gradient[2].eq(1).all()


def test_only_the_state_or_only_the_outputs_may_be_differentiated(check_close: Any) -> None:
    for which in (0, 1):
        leaves = make(2, 5, optional=True)
        double = cast(leaves, torch.float64)
        ours = causal_conv1d(**leaves, backend="triton")[which]
        oracle = naive_causal_conv1d(**double)[which]
        inputs = ("x", "initial_state")
        actual = torch.autograd.grad(ours.sum(), [leaves[n] for n in inputs])
        expected = torch.autograd.grad(oracle.sum(), [double[n] for n in inputs])
        for a, e in zip(actual, expected, strict=True):
            check_close(a, e, TOLERANCE, floor=1e-2)


def test_a_slice_of_a_projection_equals_a_contiguous_input() -> None:
    """Also with a gradient that is a slice, and with an input whose channels do not lie side by side."""
    projected, weight, dy = torch.randn(2, 9, 20), torch.randn(7, 4), torch.randn(2, 9, 12)

    def run(how: str) -> tuple[Tensor, ...]:
        leaf = projected.to(DEVICE).requires_grad_()
        x = leaf[..., 5:12]
        x = x.contiguous() if how == "packed" else x.mT.contiguous().mT if how == "transposed" else x
        y, state = causal_conv1d(x, weight.to(DEVICE), backend="triton")
        return y, state, *torch.autograd.grad(y, leaf, dy.to(DEVICE)[..., 2:9])

    for other in ("strided", "transposed"):
        for a, b in zip(run(other), run("packed"), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_may_be_written_into_a_slice(packed: bool) -> None:
    """Of a wider buffer, of which nothing else is touched; the launches are what the operators return."""
    leaves = {name: leaf.detach() for name, leaf in make(1 if packed else 2, 37, channels=7, rows=2).items()}
    before = leaves["initial_state"].transpose(1, 2).contiguous()
    borders = torch.tensor([0, 2, 37], device=DEVICE) if packed else None
    starts = starts_of(leaves["x"].shape[0], 37, 0.1)
    arguments = (leaves["x"], before, leaves["weight"], leaves["bias"], starts, borders, True)
    y, tail = triton_conv.launch_forward(*arguments)
    for a, e in zip((y, tail), torch.ops.longstate.causal_conv1d(*arguments), strict=True):
        assert torch.equal(a, e)
    expected = torch.ops.longstate.causal_conv1d_backward(y, tail, *arguments)
    wide = torch.full((y.shape[0], 40, 20), 5.0, device=DEVICE)
    around = torch.ones_like(wide, dtype=torch.bool)
    inside = (slice(None), slice(1, 38), slice(5, 12))
    around[inside] = False
    got = triton_conv.launch_backward(y, tail, *arguments, dx=wide[inside])
    assert got[0].data_ptr() == wide[inside].data_ptr()
    for a, e in zip(got, expected, strict=True):
        assert torch.equal(a, e)
    assert wide[around].eq(5.0).all()
    for unfit in (wide[..., 5:12], wide[:, 1:38, 5:19:2]):
        with pytest.raises(ValueError, match="dx has shape"):
            triton_conv.launch_backward(y, tail, *arguments, dx=unfit)


def test_offsets_reach_beyond_32_bits() -> None:
    """Tokens 2^30 elements apart, in memory of which only the tokens are ever touched. Wrapped offsets would
    stay inside it, and read zeros."""
    stride, channels = 2**30 + 8, 3
    storage = np.zeros(2**32 + 64, dtype=np.float16)
    memory = torch.from_numpy(storage)
    values = torch.randn(1, 4, channels, dtype=torch.float16)
    apart = torch.as_strided(memory, values.shape, (0, stride, 1), storage_offset=0)
    if DEVICE == "cuda":
        pytest.skip("the long input is a test of its own there")
    apart.copy_(values)
    weight = torch.randn(channels, 4)
    y, state = causal_conv1d(apart, weight, backend="triton")
    expected = causal_conv1d(values, weight, backend="triton")
    assert torch.equal(y, expected[0])
    assert torch.equal(state, expected[1])


def test_operator_is_well_formed() -> None:
    """Schemas, fake kernels, autograd registration, and tracing with dynamic shapes."""
    leaves = make(2, 5)
    before = leaves["initial_state"].detach().transpose(1, 2).contiguous().requires_grad_()
    starts = starts_of(2, 5, 0.3)
    cases = [
        (leaves["x"], before, leaves["weight"], leaves["bias"], starts, None, True),
        (leaves["x"], None, leaves["weight"], None, None, None, False),
        (make(1, 5)["x"], before, leaves["weight"], None, None, torch.tensor([0, 2, 5], device=DEVICE), True),
    ]
    for case in cases:
        torch.library.opcheck(torch.ops.longstate.causal_conv1d.default, case)
    y, tail = (t.detach() for t in torch.ops.longstate.causal_conv1d(*cases[0]))
    case = tuple(a.detach() if isinstance(a, Tensor) else a for a in cases[0])
    torch.library.opcheck(torch.ops.longstate.causal_conv1d_backward.default, (y, tail, *case))


@pytest.mark.parametrize("packed", [False, True])
def test_nothing_outside_the_final_states_gradient_is_read(packed: bool) -> None:
    """Around it lie signalling NaNs, which the interpreter's arithmetic warns of, an error in tests."""
    x, weight = torch.randn(1 if packed else 3, 5, 6, device=DEVICE), torch.randn(6, 4, device=DEVICE)
    borders = torch.tensor([0, 2, 2, 5], device=DEVICE) if packed else None
    before, guard = torch.randn(3, 3, 6, device=DEVICE), 256
    around = torch.full((2 * guard + before.numel(),), 0x7F800001, dtype=torch.int32, device=DEVICE)
    dtail = around.view(torch.float32)[guard:-guard].view_as(before).copy_(torch.randn_like(before))
    arguments = (x, before, weight, None, None, borders, True)
    guarded, alone = (
        torch.ops.longstate.causal_conv1d_backward(torch.ones_like(x), t, *arguments)
        for t in (dtail, dtail.clone())
    )
    for a, e in zip(guarded, alone, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)
        assert a.isfinite().all()


def test_compiles_without_graph_breaks() -> None:
    leaves, starts = make(2, 5), starts_of(2, 5, 0.3)

    def loss(x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor) -> Tensor:
        y, state = causal_conv1d(
            x, weight, bias, initial_state=initial_state, document_starts=starts, backend="triton"
        )
        return y.square().sum() + state.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, e in zip(
        torch.autograd.grad(compiled(**leaves), list(leaves.values())),
        torch.autograd.grad(loss(**leaves), list(leaves.values())),
        strict=True,
    ):
        assert torch.allclose(a, e)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(1, 5, 3, dtype=torch.float64)},
            "x is torch.float64: .* float32, bfloat16 and float16",
        ),
        ({"weight": torch.zeros(3, 17)}, "weight has width 17: .* at most 16"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(change: dict[str, Tensor], message: str) -> None:
    arguments = {"x": torch.zeros(1, 5, 3), "weight": torch.zeros(3, 4)} | change
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**arguments, backend="triton")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("index", range(tuning.MOST_CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_sizes_equal_the_oracle(index: int, dtype: torch.dtype, check_close: Any) -> None:
    """A layer's channels as a slice of in_proj's output; twice the same, bit for bit."""
    projected = torch.randn(3, 1000, 4384, device="cuda", dtype=dtype)
    leaves = cast(make(3, 1000, channels=2304), dtype)
    starts = starts_of(3, 1000, 0.01)
    with tuning.forced("conv_forward", index), tuning.forced("conv_backward", index):
        check_against_oracle(leaves, check_close, dtype, document_starts=starts)
        runs = []
        for _ in range(2):
            x = projected[..., 2048:4352].requires_grad_()
            y, state = causal_conv1d(x, leaves["weight"], leaves["bias"], document_starts=starts)
            runs.append(
                (y, state, *torch.autograd.grad(y, (x, leaves["weight"], leaves["bias"]), y.detach()))
            )
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_a_long_input_equals_its_end(check_close: Any) -> None:
    """600,064 tokens in rows of 4,384: beyond 2^31 elements. The last know only the three before."""
    projected = torch.zeros(1, 600_064, 4384, device="cuda", dtype=torch.bfloat16)
    projected[:, -300:].normal_()
    weight = torch.randn(2304, 4, device="cuda", requires_grad=True)

    def run(tokens: int) -> list[Tensor]:
        x = projected[:, -tokens:, 2048:4352].detach().requires_grad_()
        y, state = causal_conv1d(x, weight)
        dx, dweight = torch.autograd.grad(y, (x, weight), y.detach())
        return [y[:, -200:], state, dx[:, -200:], dweight]

    for whole, end, tolerance in zip(run(600_064), run(303), (0.0, 0.0, 2.0**-8, TOLERANCE), strict=True):
        check_close(whole, end, tolerance)

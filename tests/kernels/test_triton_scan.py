"""The scan's Triton kernels against the oracle: on a GPU, else in Triton's interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.ssd import Mitigation, ssd_scan
from kernels.ssd import triton_schedule as scheduling
from kernels.ssd.naive import naive_scan
from kernels.ssd.triton_scan import triton_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # measured: 8e-7, 5e-4, 5e-3
Leaves = dict[str, Tensor]


def discretised(
    batch: int,
    length: int,
    heads: int,
    headdim: int,
    groups: int,
    d_state: int,
    D: str = "head",
    initial: bool = True,
) -> Leaves:
    """Arguments of a core, retentions from 0.8 to 1."""
    tokens = (batch, length, heads)
    leaves = {
        "x": torch.randn(*tokens, headdim),
        "log_decay": -0.2 * torch.rand(tokens),
        "insert": 0.1 + torch.rand(tokens),
        "B": torch.randn(batch, length, groups, d_state),
        "C": torch.randn(batch, length, groups, d_state),
    }
    if D != "none":
        leaves["D"] = torch.randn((heads, headdim) if D == "channel" else (heads,))
    if initial:
        leaves["initial"] = torch.randn(batch, heads, headdim, d_state)
    return {name: leaf.to(DEVICE) for name, leaf in leaves.items()}


def check(
    leaves: Leaves,
    check_close: Any,
    dtype: torch.dtype = torch.float32,
    starts: Tensor | None = None,
    segments: int = 0,
) -> None:
    """y, the final state and every gradient, for random cotangents of both."""
    cast = {n: t.to(dtype if n in ("x", "B", "C") else torch.float32) for n, t in leaves.items()}
    results = []
    for double in (False, True):
        own = {n: (t.double() if double else t.clone()).requires_grad_() for n, t in cast.items()}
        given = [own.get(n) for n in ("x", "log_decay", "insert", "B", "C", "D", "initial")]
        scan, options = (naive_scan, {}) if double else (triton_scan, {"segments": segments})
        y, state = scan(*given, starts, 16, **options)
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(t.shape, generator=generator).to(dtype).to(t) for t in (y, state)]
        gradients = torch.autograd.grad((y, state), list(own.values()), cotangents)
        results.append({"y": y, "state": state, **dict(zip(own, gradients, strict=True))})
    for name, expected in results[1].items():
        check_close(results[0][name], expected, TOLERANCE[dtype], name)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize(
    ("sizes", "D", "initial"),
    [
        ((1, 1, 4, 16, 1, 16), "none", True),
        ((1, 3, 2, 8, 1, 5), "head", False),
        ((2, 65, 3, 20, 3, 24), "channel", True),
        ((1, 150, 4, 16, 2, 16), "head", True),
    ],
)
def test_outputs_and_gradients(
    sizes: tuple[int, ...],
    D: str,
    initial: bool,
    segments: int,
    check_close: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduling, "SLAB_BYTES", 1)  # one chunk a slab: borders everywhere
    starts = torch.rand(sizes[:2], device=DEVICE) < 0.06
    check(discretised(*sizes, D=D, initial=initial), check_close, starts=starts, segments=segments)


def test_part_of_the_channels_a_program(check_close: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(scheduling, "STATE_ELEMENTS", 256)
        check(discretised(1, 70, 2, 32, 1, 16), check_close)
    else:
        check(discretised(1, 70, 2, 128, 1, 256), check_close, torch.bfloat16)


def test_bf16_is_rounded_only_where_it_is_stored_or_multiplied(check_close: Any) -> None:
    check(discretised(1, 40, 2, 16, 1, 16), check_close, torch.bfloat16)


@pytest.mark.parametrize(
    "options",
    [
        {"dt_softplus": True, "dt_bias": True},
        {"dt_softplus": True, "dt_limit": (0.1, 1.0)},
        {"dt_softplus": True, "mitigation": Mitigation("forget_more", alpha_scale=0.99, insert_scale=0.5)},
        {"mitigation": Mitigation("delta_scale", delta_scale=1.3)},
        {"mitigation": Mitigation("sliding_window", window=13)},
        {"mitigation": Mitigation("hard_reset", every=13)},
        {"mitigation": Mitigation("state_norm", max_norm=3.0, every=16)},
        {"cu_seqlens": [0, 3, 4, 70, 80], "dt_softplus": True},
        {"states_every": 20},
    ],
    ids=lambda options: "-".join(getattr(v, "name", k) for k, v in options.items()),
)
def test_every_option_of_the_public_function(options: dict[str, Any], check_close: Any) -> None:
    length, heads = 80, 4
    leaves = discretised(1, length, heads, 16, 2, 16, D="none", initial=False)
    dt = torch.randn(1, length, heads, device=DEVICE)
    arguments = {
        "x": leaves["x"],
        "dt": dt if options.get("dt_softplus") else dt.abs(),
        "A": -torch.rand(heads, device=DEVICE) - 0.1,
        "B": leaves["B"],
        "C": leaves["C"],
    }
    options = dict(options)
    if options.pop("dt_bias", False):
        arguments["dt_bias"] = torch.randn(heads, device=DEVICE)
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"], device=DEVICE)
    results = {}
    for backend in ("naive", "triton"):
        own = {name: t.clone().requires_grad_() for name, t in arguments.items()}
        results_ = ssd_scan(**own, backend=backend, **options)  # type: ignore[arg-type]
        outputs = [t for t in results_ if isinstance(t, Tensor)]
        torch.manual_seed(1)
        gradients = torch.autograd.grad(
            outputs, list(own.values()), [torch.randn_like(t.float()) for t in outputs]
        )
        results[backend] = [*outputs, *gradients]
    for i, (actual, expected) in enumerate(zip(results["triton"], results["naive"], strict=True)):
        check_close(actual, expected, 1e-4, f"result {i}")


def test_views_of_one_projection_are_read_in_place(check_close: Any) -> None:
    heads, headdim, d_state, length = 2, 16, 16, 40
    whole = torch.randn(1, length, heads * headdim + 2 * d_state, device=DEVICE)
    x, B, C = whole.split([heads * headdim, d_state, d_state], -1)
    leaves = discretised(1, length, heads, headdim, 1, d_state)
    views = {"x": x.unflatten(-1, (heads, headdim)), "B": B[:, :, None], "C": C[:, :, None]}
    given = {**leaves, **views}
    contiguous = {**leaves, **{n: t.contiguous() for n, t in views.items()}}
    order = ("x", "log_decay", "insert", "B", "C", "D", "initial")
    for a, e in zip(
        triton_scan(*map(given.get, order), None), triton_scan(*map(contiguous.get, order), None), strict=True
    ):  # type: ignore[arg-type]
        torch.testing.assert_close(a, e, rtol=0, atol=0)


def test_a_token_of_a_long_row_is_found_beyond_32_bits() -> None:
    plan = scheduling.schedule(1, 2**21, 32, 64, 128, 2, 132)
    assert plan.parallel
    assert plan.slab_chunks % plan.segment_chunks == 0
    assert plan.segments * plan.segment_chunks * plan.chunk >= 2**21


def test_the_operator_is_registered_for_torch_compile() -> None:
    torch.library.opcheck(
        torch.ops.longstate.ssd_scan.default,
        operator_arguments(),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_compiles_without_a_graph_break(check_close: Any) -> None:
    leaves = discretised(1, 40, 2, 16, 1, 16)
    order = ("x", "log_decay", "insert", "B", "C", "D", "initial")

    def run(*given: Any) -> Tensor:
        return triton_scan(*given, None)[0].square()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    results = []
    for function in (run, compiled):
        own = [leaves[name].clone().requires_grad_() for name in order]
        y = function(*own)
        results.append([y, *torch.autograd.grad(y.sum(), own)])
    for i, (actual, expected) in enumerate(zip(results[1], results[0], strict=True)):
        check_close(actual, expected, 1e-6, f"result {i}")


def operator_arguments() -> tuple[Any, ...]:
    leaves = discretised(1, 20, 2, 16, 1, 16)
    x, a, w, B, C, D, initial = (t.requires_grad_() for t in leaves.values())
    return (x, a, None, None, None, None, w, B, C, D, initial, None, None, False, 0.0, 3.0e38, 0)


def test_a_state_too_large_is_refused() -> None:
    leaves = discretised(1, 4, 1, 128, 1, 512)
    with pytest.raises(ValueError, match="headdim=128, d_state=512"):
        triton_scan(*(t.requires_grad_() for t in leaves.values()), None)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("headdim", [16, 32, 64, 128])
@pytest.mark.parametrize("d_state", [4, 16, 64, 128, 256, 512])
def test_sizes_on_a_gpu(d_state: int, headdim: int, dtype: torch.dtype, check_close: Any) -> None:
    if headdim * d_state * dtype.itemsize > scheduling.LARGEST_STATE:
        pytest.skip("refused: see test_a_state_too_large_is_refused")
    starts = torch.rand(1, 300, device=DEVICE) < 0.02
    check(discretised(1, 300, 4, headdim, 2, d_state), check_close, dtype, starts)

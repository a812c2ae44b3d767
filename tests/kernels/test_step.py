"""The single-token step: the scan's oracle, one token at a time, on every backend that runs here."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.ssd import Mitigation, ssd_scan
from kernels.ssd.step import ssd_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5
BACKENDS = ("torch", "triton")
TOKENWISE = ("x", "dt", "B", "C")


def make(
    length: int = 1, batch: int = 3, heads: int = 4, headdim: int = 5, d_state: int = 6, groups: int = 2
) -> dict[str, Tensor]:
    """Arguments of `ssd_scan`, dt after softplus."""
    values = {
        "x": torch.randn(batch, length, heads, headdim),
        "dt": torch.rand(batch, length, heads),
        "A": -torch.rand(heads) - 0.1,
        "B": torch.randn(batch, length, groups, d_state),
        "C": torch.randn(batch, length, groups, d_state),
    }
    return {name: value.to(DEVICE) for name, value in values.items()}


def per_head(*values: float) -> Tensor:
    return torch.tensor(values, device=DEVICE)


OPTIONS: list[dict[str, Any]] = [
    {},
    {
        "D": lambda: torch.randn(4, device=DEVICE),
        "dt_bias": lambda: torch.randn(4, device=DEVICE),
        "dt_softplus": True,
    },
    {"D": lambda: torch.randn(4, 5, device=DEVICE), "dt_softplus": True, "dt_limit": (0.5, 0.7)},
    {"dt_limit": (0.0, float("inf")), "mitigation": lambda: Mitigation("forget_more", 0.99, 0.75)},
    {
        "mitigation": lambda: Mitigation(
            "forget_more", per_head(0.9, 1.0, 0.9999, 0.5), per_head(1, 0.5, 0.1, 1)
        )
    },
    {"mitigation": lambda: Mitigation("both", delta_scale=0.5, decay_scale=per_head(0.5, 1.0, 3.0, 1.2))},
    {"mitigation": lambda: Mitigation("delta_scale", delta_scale=per_head(0.5, 1.0, 1.3, 0.9).double())},
    {"mitigation": lambda: Mitigation("token_filter", threshold=0.4)},
    {
        "mitigation": lambda: Mitigation(
            "token_filter", threshold=per_head(0.2, 0.0, 0.7, 2.0), heads=(0, 1, 3)
        )
    },
    {"mitigation": lambda: Mitigation("forget_more", per_head(0.9, 1.0, 0.9999, 0.5), 0.5, heads=(0, 2))},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_steps_equal_the_scan(options: dict[str, Any], backend: Any, check_close: Any) -> None:
    """Four tokens, the state handed on in place, from a state that is not zero."""
    options = {name: value() if callable(value) else value for name, value in options.items()}
    arguments, state = make(length=4), torch.randn(3, 4, 5, 6, device=DEVICE)
    expected, final = ssd_scan(**arguments, **options, initial_state=state.clone(), backend="naive")
    outputs = []
    for t in range(4):
        token = {name: value[:, t] if name in TOKENWISE else value for name, value in arguments.items()}
        outputs.append(ssd_step(state, **token, **options, backend=backend))
    check_close(torch.stack(outputs, 1), expected, TOLERANCE, "y")
    check_close(state, final, TOLERANCE, "state")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("log_decay", [-1e-7, -0.1, -0.13, -17.0, -80.0])
def test_every_speed_of_forgetting(log_decay: float, backend: Any, check_close: Any) -> None:
    """Also where almost nothing stays beside an input that is small itself."""
    arguments = {name: value[:, 0] if name in TOKENWISE else value for name, value in make().items()}
    arguments["dt"], arguments["A"] = (
        torch.ones_like(arguments["dt"]),
        torch.full_like(arguments["A"], log_decay),
    )
    arguments["x"] *= 1e-7
    state = torch.randn(3, 4, 5, 6, device=DEVICE)
    inserted = arguments["x"][..., None] * arguments["B"].repeat_interleave(2, 1)[:, :, None]
    expected = state.double() * torch.tensor(log_decay).double().exp() + inserted.double()
    ssd_step(state, **arguments, backend=backend)
    check_close(state, expected, TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_softplus_is_exact_where_it_is_small(backend: Any) -> None:
    """dt = log1p(e^v) for v down to -60, where log(1 + e^v) is zero in fp32."""
    dt = torch.tensor([[-60.0, -20.0, -9.0, -3.0, 0.0, 5.0, 50.0]], device=DEVICE)
    heads = dt.shape[1]
    state = torch.zeros(1, heads, 1, 1, device=DEVICE)
    ones = torch.ones(1, 1, 1, device=DEVICE)
    A = torch.zeros(heads, device=DEVICE)
    ssd_step(
        state, torch.ones(1, heads, 1, device=DEVICE), dt, A, ones, ones, dt_softplus=True, backend=backend
    )
    expected = torch.log1p(dt.double().exp())
    assert (state.flatten() / expected.flatten() - 1).abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_active_stay_as_they_are(backend: Any) -> None:
    """Bit for bit, whatever their token holds; the others do not notice."""
    arguments = {name: value[:, 0] if name in TOKENWISE else value for name, value in make().items()}
    D, before = torch.randn(4, device=DEVICE), torch.randn(3, 4, 5, 6, device=DEVICE)
    alone = before.clone()
    expected = ssd_step(alone, **arguments, D=D, backend=backend)
    for name in TOKENWISE:
        arguments[name][1] = torch.nan
    state = before.clone()
    active = torch.tensor([True, False, True], device=DEVICE)
    y = ssd_step(state, **arguments, D=D, active=active, backend=backend)
    assert torch.equal(state[1], before[1])
    assert torch.equal(y[1], torch.zeros_like(y[1]))
    assert torch.equal(y[active], expected[active])
    assert torch.equal(state[active], alone[active])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_keep_an_fp32_state(dtype: torch.dtype, backend: Any, check_close: Any) -> None:
    arguments = {name: value[:, 0] if name in TOKENWISE else value for name, value in make().items()}
    arguments = {name: value.to(dtype) if name in TOKENWISE else value for name, value in arguments.items()}
    state = torch.randn(3, 4, 5, 6, device=DEVICE)
    oracle = {
        name: value[:, None].double() if name in TOKENWISE else value for name, value in arguments.items()
    }
    y, final = ssd_scan(**oracle, initial_state=state.double(), backend="naive")
    actual = ssd_step(state, **arguments, backend=backend)
    assert actual.dtype == dtype
    check_close(actual, y[:, 0], 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10, "y")
    check_close(state, final, TOLERANCE, "state")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"state": torch.zeros(1, 4, 5, 6, dtype=torch.bfloat16)},
            r"state is torch.bfloat16 .* expected float32",
        ),
        ({"state": torch.zeros(1, 4, 6, 5).mT}, r"strides \(120, 30, 1, 5\): expected .* N contiguous"),
        ({"x": torch.zeros(1, 4, 6)}, r"x has shape \(1, 4, 6\): expected \(1, 4, 5\)"),
        ({"B": torch.zeros(1, 3, 6)}, r"B has shape \(1, 3, 6\): .* the 4 heads"),
        ({"active": torch.ones(2, dtype=torch.bool)}, r"active has shape \(2,\): expected \(1,\)"),
        ({"dt": torch.zeros(1, 4, requires_grad=True)}, "dt records gradients: use ssd_scan with T = 1"),
        ({"mitigation": Mitigation("forget_more", 0.9, heads=(1, 7))}, r"mitigation.heads names \[7\]"),
        ({"mitigation": Mitigation("hard_reset", every=3)}, "of several scans; use ssd_scan with T = 1"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"state": torch.zeros(1, 4, 5, 6), "x": torch.zeros(1, 4, 5)}
    arguments |= {"dt": torch.zeros(1, 4), "A": torch.zeros(4)}
    arguments |= {"B": torch.zeros(1, 2, 6), "C": torch.zeros(1, 2, 6)}
    with pytest.raises(ValueError, match=message):
        ssd_step(**arguments | change)


def test_parameters_may_record_gradients_where_none_are_recorded() -> None:
    arguments = {name: value[:, 0] if name in TOKENWISE else value for name, value in make().items()}
    arguments["A"].requires_grad_()
    with torch.no_grad():
        y = ssd_step(torch.zeros(3, 4, 5, 6, device=DEVICE), **arguments)
    assert not y.requires_grad

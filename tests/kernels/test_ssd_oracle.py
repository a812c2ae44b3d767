"""The chunked scan against the float64 oracle, and the oracle against the sum written out."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.ssd import Mitigation, ssd_scan

TOLERANCE = 1e-4  # relative, in L2 and in the maximum norm; measured: 1e-6, and 3e-5 with mixed retention


def as_double(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}


def written_out(case: Any, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """h_T and y_t as explicit sums over all earlier tokens of the document, in float64; shares no code."""
    x, dt, A, B, C = (leaves[name] for name in ("x", "dt", "A", "B", "C"))
    if "dt_bias" in leaves:
        dt = dt + leaves["dt_bias"]
    if case.dt_softplus:
        dt = torch.logaddexp(dt, torch.zeros_like(dt))
    if case.dt_limit is not None:
        dt = dt.clamp(*case.dt_limit)
    f = {name: leaves.get(name, value) for name, value in case.factors.items()}
    dt = dt * f.get("delta_scale", 1.0)
    retention = torch.exp(dt * A * f.get("decay_scale", 1.0)) * f.get("alpha_scale", 1.0)
    kept = retention.log().cumsum(1)
    starts = case.starts()
    document = torch.zeros(x.shape[:2]) if starts is None else starts.int().cumsum(1)
    steps = torch.arange(case.length)
    seen = (steps[:, None] >= steps) & (document[:, :, None] == document[:, None, :])  # B q r
    exponent = (kept[:, :, None] - kept[:, None]).masked_fill(~seen[..., None], -torch.inf)  # B q r H
    B, C = (m.repeat_interleave(case.heads // case.groups, dim=2) for m in (B, C))
    weight = exponent.exp() * (dt * f.get("insert_scale", 1.0))[:, None]
    y = torch.einsum("bqhn,brhn,bqrh,brhp->bqhp", C, B, weight, x)
    state = torch.einsum("brh,brhp,brhn->bhpn", weight[:, -1], x, B)
    if "initial_state" in leaves:
        reach = kept.exp() * (document == 0)[..., None]
        y = y + torch.einsum("bqhn,bqh,bhpn->bqhp", C, reach, leaves["initial_state"])
        state = state + reach[:, -1, :, None, None] * leaves["initial_state"]
    if "D" in leaves:
        y = y + x * leaves["D"].view(case.heads, -1)
    return y, state


@settings(max_examples=40)
@given(data=st.data())
def test_oracle_is_the_sum_written_out(data: Any, scan_cases: Any, gradients: Any, check_scan: Any) -> None:
    case = data.draw(scan_cases(max_length=40))
    ours, theirs = (as_double(case.leaves()) for _ in range(2))
    oracle, explicit = case.scan(ours, backend="naive"), written_out(case, theirs)
    results = (*oracle, gradients(oracle, ours)), (*explicit, gradients(explicit, theirs))
    check_scan(case, *results, 1e-9)


@settings(max_examples=150)
@given(data=st.data())
def test_chunked_is_the_oracle(data: Any, scan_cases: Any, gradients: Any, check_scan: Any) -> None:
    case = data.draw(scan_cases())
    ours, theirs = case.leaves(), as_double(case.leaves())
    chunked, oracle = case.scan(ours), case.scan(theirs, backend="naive")
    assert (chunked[0].dtype, chunked[1].dtype) == (torch.float32, torch.float32)
    results = (*chunked, gradients(chunked, ours)), (*oracle, gradients(oracle, theirs))
    check_scan(case, *results, TOLERANCE)


@pytest.mark.parametrize("chunk_size", [16, 64, 256])
def test_fast_tokens_do_not_blur_the_slow_ones_between_them(
    chunk_size: int, scan_case: Any, gradients: Any, check_close: Any
) -> None:
    """Log decays of -50 beside -0.01: sums over a chunk reach thousands, their differences matter to 1e-4."""
    case = scan_case(length=512, headdim=8, groups=1, d_state=16, chunk_size=chunk_size)
    leaves = case.leaves()
    with torch.no_grad():
        leaves["A"].fill_(-1.0)
        leaves["dt"].fill_(0.01)
        leaves["dt"][:, ::2] = 50.0
        leaves["x"][:, ::2] *= 1e-3  # a token that only resets
    double = as_double(leaves)
    chunked, oracle = case.scan(leaves), case.scan(double, backend="naive")
    check_close(chunked[0], oracle[0], TOLERANCE, "y")
    check_close(chunked[1], oracle[1], TOLERANCE, "state")
    expected = gradients(oracle, double)
    for name, actual in gradients(chunked, leaves).items():
        if name != "gradient of A":  # 50 times the rounding of sums that cancel; covered above
            check_close(actual, expected[name], TOLERANCE, name)


@pytest.mark.parametrize("seed", range(3))
def test_fast_decay_leaves_no_noise_in_its_gradients(seed: int, scan_case: Any, gradients: Any) -> None:
    """With retention exp(-50) nothing passes from token to token: the true gradient of A is below 1e-15.

    It is 0 only if terms that cancel are subtracted before others are added; what is left would be
    multiplied by A = -50 into dt_bias, over every token before it in the chunk.
    """
    case = scan_case(length=140, heads=2, headdim=1, d_state=16, chunk_size=256, regime="fast", seed=seed)
    leaves = case.leaves()
    assert gradients(case.scan(leaves), leaves)["gradient of A"].abs().max() < 1e-12


@settings(max_examples=60)
@given(data=st.data())
def test_bf16_is_the_oracle_of_the_same_values(
    data: Any, scan_cases: Any, gradients: Any, check_close: Any
) -> None:
    """x, dt, B and C in bf16, states and decays in fp32: operands of matrix products have 8 bits.

    Stated: 2e-2 relative on y and state, 4e-2 on gradients, 0.15 on those that sum over tokens and channels
    (A, dt_bias, factors). Median of 500 random cases: 4e-3.
    """
    case = data.draw(scan_cases())
    ours = case.leaves(torch.bfloat16)
    theirs = as_double(ours)
    chunked, oracle = case.scan(ours), case.scan(theirs, backend="naive")
    assert (chunked[0].dtype, chunked[1].dtype) == (torch.bfloat16, torch.float32)
    floor = 0.6 * math.sqrt(case.length)  # a sum over the tokens, if its terms do not cancel
    check_close(chunked[0], oracle[0], 2e-2, "y", floor=floor)
    check_close(chunked[1], oracle[1], 2e-2, "state", floor=floor)
    expected = gradients(oracle, theirs, like=chunked)
    for name, actual in gradients(chunked, ours).items():
        leaf = name.removeprefix("gradient of ")
        assert actual.dtype == ours[leaf].dtype
        if size := case.size_of_sum(leaf):
            # times the tokens that a state reaches; where all reach all, the smaller sum of larger terms
            check_close(actual, expected[name], 0.15, name, floor=size * case.length / 4)
        else:
            check_close(actual, expected[name], 4e-2, name, floor=max(floor, 10.0) if leaf == "dt" else floor)


def test_softplus_far_from_zero(scan_case: Any, check_close: Any) -> None:
    """dt before softplus from -30 to 45: exact where it is linear, and where it vanishes."""
    case = scan_case(length=76, regime="slow", dt_softplus=True)
    double = as_double(case.leaves())
    with torch.no_grad():
        double["dt"].copy_(torch.arange(-30.0, 46.0)[:, None])
    oracle, explicit = case.scan(double, backend="naive"), written_out(case, double)
    check_close(oracle[0], explicit[0], 1e-13, "y")
    single = {name: leaf.float() for name, leaf in double.items()}
    for token in range(76):  # alone, or the large ones would hide the small
        piece = slice(token, token + 1)
        y, expected = case.scan(single, piece)[0], case.scan(double, piece, backend="naive")[0]
        check_close(y, expected, 1e-6, f"dt {token - 30}")


def test_slices_of_one_projection_equal_contiguous_inputs(gradients: Any, check_close: Any) -> None:
    """x, B, C and dt as views of one in_proj output, the way a layer calls it."""
    B, T, H, P, G, N = 2, 75, 4, 8, 2, 12
    projected = torch.randn(B, T, H * P + 2 * G * N + H + 5)  # five further channels: an uneven row stride
    A = -torch.rand(H) - 0.1

    def scan(contiguous: bool) -> tuple[Tensor, ...]:
        leaf = projected.clone().requires_grad_()
        x, b, c, dt, _ = leaf.split([H * P, G * N, G * N, H, 5], dim=-1)
        views = [x.unflatten(-1, (H, P)), dt, b.unflatten(-1, (G, N)), c.unflatten(-1, (G, N))]
        assert not views[0].is_contiguous()
        x, dt, b, c = [v.contiguous() if contiguous else v for v in views]
        outputs = ssd_scan(x, dt, A, b, c, dt_softplus=True, chunk_size=32)
        return *outputs, gradients(outputs, {"projected": leaf})["gradient of projected"]

    for strided, packed in zip(scan(False), scan(True), strict=True):
        check_close(strided, packed, 1e-6)  # a matrix product may add in another order for another stride


def test_broadcast_cotangents(gradients: Any) -> None:
    """A loss such as y.sum() sends expanded cotangents of stride 0, and none into an unused final state."""
    x, dt, A = torch.randn(1, 20, 2, 3), torch.rand(1, 20, 2), -torch.rand(2)
    B, C = torch.randn(1, 20, 1, 4), torch.randn(1, 20, 1, 4)
    x.requires_grad_()
    (from_sum,) = torch.autograd.grad(ssd_scan(x, dt, A, B, C)[0].sum(), x)
    y, _ = ssd_scan(x, dt, A, B, C)
    (from_ones,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(from_sum, from_ones)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x has shape \(2, 3, 4\)"),
        ({"x": torch.zeros(2, 0, 4, 3)}, "T >= 1"),
        ({"dt": torch.zeros(2, 5, 3)}, r"dt has shape \(2, 5, 3\): expected \(2, 5, 4\)"),
        ({"A": torch.zeros(3)}, "A has shape"),
        ({"B": torch.zeros(2, 5, 3, 6)}, "3 groups"),
        ({"C": torch.zeros(2, 5, 2, 7)}, "C has shape"),
        ({"B": torch.zeros(2, 5, 2, 6, dtype=torch.bfloat16)}, "dtype"),
        ({"D": torch.zeros(5)}, r"D has shape \(5,\): expected \(4,\) or \(4, 3\)"),
        ({"initial_state": torch.zeros(2, 4, 6, 3)}, "initial_state has shape"),
        ({"document_starts": torch.zeros(2, 4, dtype=torch.bool)}, "document_starts has shape"),
        ({"chunk_size": 48}, "chunk_size=48: must be a power of two"),
        ({"chunk_size": 8}, "chunk_size=8"),
        ({"backend": "fast"}, "backend='fast'"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 5, 4, 3),
        "dt": torch.zeros(2, 5, 4),
        "A": torch.zeros(4),
        "B": torch.zeros(2, 5, 2, 6),
        "C": torch.zeros(2, 5, 2, 6),
    }
    with pytest.raises(ValueError, match=message):
        ssd_scan(**arguments | change)


def test_mitigation_key_names_every_factor() -> None:
    assert Mitigation().key == "none"
    one, other = (
        Mitigation(name="forget_more", alpha_scale=0.99),
        Mitigation(name="forget_more", alpha_scale=0.999),
    )
    per_head = Mitigation(name="forget_more", alpha_scale=torch.tensor([0.99, 0.99]))
    assert len({one.key, other.key, per_head.key}) == 3
    assert one.key == Mitigation(name="forget_more", alpha_scale=0.99).key

"""The fused layer against the composition of float64 oracles: on a GPU, else in Triton's interpreter."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels.mixer.triton_mixer  # noqa: F401  registers longstate::mixer
from kernels.conv import causal_conv1d, naive_causal_conv1d
from kernels.mixer import fused_mixer
from kernels.norm import gated_rms_norm, naive_gated_rms_norm
from kernels.ssd import Mitigation, ssd_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 2e-5  # fp32 against float64; measured: 2e-6
NAMES = ("zxbcdt", "conv_weight", "conv_bias", "dt_bias", "A", "D", "norm_weight", "out_weight")
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]
Leaves = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    batch: int = 2
    length: int = 37
    heads: int = 2
    headdim: int = 16
    groups: int = 1
    d_state: int = 16
    d_model: int = 24
    D_by_channel: bool = False
    norm_before_gate: bool = False
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    mitigation: Mitigation = field(default_factory=Mitigation)
    states: bool = False
    starts: bool = False

    def leaves(self, dtype: torch.dtype = torch.float32) -> Leaves:
        d_inner, of_state = self.heads * self.headdim, self.groups * self.d_state
        conv_dim = d_inner + 2 * of_state
        shape = (self.heads, self.headdim) if self.D_by_channel else (self.heads,)
        made = {
            "zxbcdt": torch.randn(self.batch, self.length, d_inner + conv_dim + self.heads).to(dtype),
            "conv_weight": torch.randn(conv_dim, 4) / 2,
            "conv_bias": torch.randn(conv_dim) / 2,
            "dt_bias": torch.randn(self.heads),
            "A": -torch.rand(self.heads) - 0.1,
            "D": torch.randn(shape),
            "norm_weight": torch.randn(d_inner),
            "out_weight": (torch.randn(self.d_model, d_inner) / d_inner**0.5).to(dtype),
        }
        if self.states:
            made["conv_state"] = torch.randn(self.batch, conv_dim, 3).to(dtype)
            made["initial_state"] = torch.randn(self.batch, self.heads, self.headdim, self.d_state)
        return {name: leaf.to(DEVICE).requires_grad_() for name, leaf in made.items()}

    def document_starts(self) -> Tensor | None:
        return torch.rand(self.batch, self.length, device=DEVICE) < 0.1 if self.starts else None

    def options(self) -> dict[str, Any]:
        names = ("norm_before_gate", "dt_limit", "mitigation", "headdim")
        return {name: getattr(self, name) for name in names} | {"n_groups": self.groups, "eps": 1e-5}


def composed(
    convolve: Callable[..., Any],
    scan: Callable[..., Any],
    norm: Callable[..., Tensor],
    leaves: Leaves,
    starts: Tensor | None,
    o: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer of one operator after another."""
    heads, d_inner = len(leaves["A"]), leaves["out_weight"].shape[1]
    conv_dim = len(leaves["conv_weight"])
    z, xBC, dt = leaves["zxbcdt"].split([d_inner, conv_dim, heads], dim=2)
    xBC, tail = convolve(
        xBC, leaves["conv_weight"], leaves["conv_bias"], initial_state=leaves.get("conv_state"),
        document_starts=starts,
    )  # fmt: skip
    of_state = (conv_dim - d_inner) // 2
    x, B, C = xBC.split([d_inner, of_state, of_state], dim=2)
    y, final = scan(
        x.unflatten(2, (heads, -1)), dt, leaves["A"], B.unflatten(2, (o["n_groups"], -1)),
        C.unflatten(2, (o["n_groups"], -1)), D=leaves["D"], initial_state=leaves.get("initial_state"),
        document_starts=starts, dt_bias=leaves["dt_bias"], dt_softplus=True, dt_limit=o["dt_limit"],
        mitigation=o["mitigation"],
    )  # fmt: skip
    normed = norm(
        y.flatten(2), z, leaves["norm_weight"], eps=o["eps"], n_groups=o["n_groups"],
        norm_before_gate=o["norm_before_gate"],
    )  # fmt: skip
    return F.linear(normed, leaves["out_weight"]), tail, final


def oracle(leaves: Leaves, starts: Tensor | None, o: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    def scan(*tensors: Tensor, **options: Any) -> Any:
        return ssd_scan(*tensors, **options, backend="naive")

    return composed(naive_causal_conv1d, scan, naive_gated_rms_norm, leaves, starts, o)


def fused(leaves: Leaves, starts: Tensor | None, o: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    states = {name: leaf for name, leaf in leaves.items() if name not in NAMES}
    return fused_mixer(*(leaves[name] for name in NAMES), **states, **o, document_starts=starts)


CASES = {
    "plain": Case(),
    "one token": Case(length=1),
    "odd sizes": Case(batch=1, length=67, heads=3, headdim=10, d_state=6, d_model=5),
    "groups, states, documents": Case(heads=4, groups=2, states=True, starts=True),
    "one token with states": Case(batch=3, length=1, states=True, starts=True),
    "D by channel, norm first": Case(D_by_channel=True, norm_before_gate=True, length=20),
    "limits and factors": Case(
        dt_limit=(0.1, 0.8), mitigation=Mitigation("forget_more", alpha_scale=0.99, insert_scale=0.9)
    ),
    "factors of some heads": Case(mitigation=Mitigation("decay_scale", decay_scale=2.0, heads=(1,))),
}
LARGE = {
    "rows of a batch": Case(8, 300, 32, 64, 1, 128, 256, states=True, starts=True),
    "segments": Case(1, 5000, 8, 64, 1, 128, 128, states=True),
    "wide heads": Case(2, 1000, 4, 128, 1, 64, 128),
    "groups": Case(2, 700, 8, 64, 2, 32, 128, norm_before_gate=True),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_oracles(name: str, check_close: Any) -> None:
    """Outputs, both final states and every gradient."""
    case = CASES[name]
    leaves, starts, options = case.leaves(), case.document_starts(), case.options()
    double = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    actual, expected = fused(leaves, starts, options), oracle(double, starts, options)
    for what, a, e in zip(("out", "conv_state", "state"), actual, expected, strict=True):
        check_close(a, e, TOLERANCE, what)
    cotangents = [torch.randn_like(t) for t in actual]
    given = torch.autograd.grad(actual, list(leaves.values()), cotangents)
    wanted = torch.autograd.grad(expected, list(double.values()), [t.double() for t in cotangents])
    for (name, leaf), a, e in zip(leaves.items(), given, wanted, strict=True):
        assert a.dtype == leaf.dtype
        check_close(a, e, TOLERANCE, f"gradient of {name}")


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_gpu) for name in LARGE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equals_the_operators_at_full_size(name: str, dtype: torch.dtype, check_close: Any) -> None:
    """The kernels for Hopper, slabs and segments make what one operator after another makes."""
    case = LARGE[name]
    leaves, starts, options = case.leaves(dtype), case.document_starts(), case.options()
    others = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    actual = fused(leaves, starts, options)
    expected = composed(causal_conv1d, ssd_scan, gated_rms_norm, others, starts, options)
    for what, a, e in zip(("out", "conv_state", "state"), actual, expected, strict=True):
        check_close(a, e, 1e-6, what)
    cotangents = [torch.randn_like(t) for t in actual]
    given = torch.autograd.grad(actual, list(leaves.values()), cotangents)
    wanted = torch.autograd.grad(expected, list(others.values()), cotangents)
    for name, a, e in zip(leaves, given, wanted, strict=True):
        check_close(a, e, 1e-5 if dtype is torch.float32 else 4e-3, f"gradient of {name}")


def test_gradients_of_one_output_alone_and_of_few_inputs(check_close: Any) -> None:
    """Autograd then gives no gradient for the other outputs."""
    case = Case(length=20, states=True)
    leaves = case.leaves()
    for index in range(3):
        for name in ("zxbcdt", "conv_state", "initial_state"):
            actual, expected = (make(leaves, None, case.options())[index] for make in (fused, oracle))
            (a,) = torch.autograd.grad(actual.sum(), leaves[name], allow_unused=True)
            (e,) = torch.autograd.grad(expected.sum(), leaves[name], allow_unused=True)
            if e is None:
                assert a is None or not a.any()
            else:
                check_close(a, e, TOLERANCE, name, floor=1.0)


def test_recomputed_inside_a_checkpoint() -> None:
    case = Case(length=20, states=True)
    leaves, gradients = case.leaves(), []
    for recompute in (False, True):
        call = lambda: fused(leaves, None, case.options())[0]  # noqa: E731
        out = checkpoint(call, use_reentrant=False) if recompute else call()
        gradients.append(torch.autograd.grad(out.square().sum(), list(leaves.values())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full: bool) -> None:
    """Schemas, fake tensors, autograd and tracing of both operators, with and without options."""
    case = Case(batch=1, length=20, states=full, starts=full)
    leaves = case.leaves()
    rate = leaves["A"].detach().requires_grad_()
    numbers = [torch.rand(2, device=DEVICE).log() if full else None, torch.rand(2, device=DEVICE)]
    before = leaves["conv_state"].detach().transpose(1, 2).contiguous() if full else None
    initial, starts = leaves.get("initial_state"), case.document_starts()
    tensors = [
        leaves["zxbcdt"], leaves["conv_weight"], leaves["conv_bias"], rate, *numbers, leaves["dt_bias"],
        leaves["D"], leaves["norm_weight"], leaves["out_weight"], before,
    ]  # fmt: skip
    options = (16, 1, 1e-5, False, 0.0, 3e38)
    torch.library.opcheck(torch.ops.longstate.mixer.default, (*tensors, initial, starts, *options))
    out, tail, final, *kept = torch.ops.longstate.mixer(*tensors, initial, starts, *options)
    detached = [None if t is None else t.detach() for t in (*tensors, starts, *kept)]
    given = (out, tail, final) if full else (out, None, None)
    given = tuple(None if t is None else t.detach() for t in given)
    torch.library.opcheck(torch.ops.longstate.mixer_backward.default, (*detached, *options, *given))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"zxbcdt": (2, 37, 97)}, "zxbcdt has 97 columns, conv_weight 64 channels"),
        ({"D": (3,)}, r"D has shape \(3,\): expected \(2,\) or \(2, 16\)"),
        ({"out_weight": (24, 31)}, "out_weight has shape"),
        ({"norm_weight": (31,)}, "norm_weight has shape"),
        ({"initial_state": (2, 2, 16, 15)}, "initial_state has shape"),
        ({"conv_state": (2, 64, 4)}, "conv_state has shape"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, tuple[int, ...]], said: str) -> None:
    case = Case()
    leaves = case.leaves() | {name: torch.zeros(shape, device=DEVICE) for name, shape in change.items()}
    with pytest.raises(ValueError, match=said):
        fused(leaves, None, case.options())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"zxbcdt": torch.float64, "out_weight": torch.float64}, "x has dtype float64: expected float32"),
        (
            {"out_weight": torch.bfloat16},
            "out_weight is torch.bfloat16, zxbcdt torch.float32: must be of one",
        ),
        ({"initial_state": torch.bfloat16}, "initial_state has dtype bfloat16: expected float32"),
    ],
)
def test_what_the_kernels_would_round_is_refused(change: dict[str, torch.dtype], said: str) -> None:
    case = Case(states=True)
    leaves = case.leaves()
    leaves |= {name: leaves[name].to(dtype) for name, dtype in change.items()}
    with pytest.raises(ValueError, match=said):
        fused(leaves, None, case.options())


def test_what_the_kernels_would_misread_is_refused() -> None:
    """Starts of 8 bytes each, no token, a head or a value per head too many, taps that no kernel takes."""
    case = Case()
    starts = torch.zeros(case.batch, case.length, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="document_starts has dtype int64: expected bool"):
        fused(case.leaves(), starts, case.options())
    with pytest.raises(ValueError, match=r"expected .* with T >= 1"):
        fused(Case(length=0).leaves(), None, case.options())
    for settings, said in (
        ({"decay_scale": 2.0, "heads": (2,)}, "mitigation.heads names"),
        ({"decay_scale": torch.ones(3)}, "mitigation.decay_scale has shape"),
    ):
        odd = case.options() | {"mitigation": Mitigation("decay_scale", **settings)}
        with pytest.raises(ValueError, match=said):
            fused(case.leaves(), None, odd)
    leaves = case.leaves()
    for width in (1, 17):
        leaves["conv_weight"] = torch.zeros(len(leaves["conv_bias"]), width, device=DEVICE)
        with pytest.raises(ValueError, match=f"conv_weight has width {width}"):
            fused(leaves, None, case.options())


def test_mitigations_of_several_scans_are_refused() -> None:
    case = Case(mitigation=Mitigation("sliding_window", window=5))
    with pytest.raises(ValueError, match="not one that the scan's kernels multiply in"):
        fused(case.leaves(), None, case.options())

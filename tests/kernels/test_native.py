"""The compiled CPU kernels: equal to PyTorch's passes, deterministic, and absent without harm or silence.

Against the float64 oracles they are tested where the PyTorch forms are: both run through the same functions.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.conv import causal_conv1d
from kernels.native import build
from kernels.native import scan as native_scan
from kernels.norm import gated_rms_norm, rms_norm
from kernels.ssd import ssd_scan
from lightning_modules import cpu

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(build.library() is None, reason="no C compiler")

Run = Callable[[torch.dtype], list[Tensor]]


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """The library is looked for anew, in this test and after it."""
    build.library.cache_clear()
    yield
    build.library.cache_clear()


def results(outputs: tuple[Tensor, ...], leaves: dict[str, Tensor]) -> list[Tensor]:
    """Outputs and gradients of the leaves, for random gradients of the outputs."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, list(leaves.values()), weights)]


def conv(dtype: torch.dtype) -> list[Tensor]:
    """Two segments and a bit, a slice of a projection, documents, an initial state."""
    torch.manual_seed(0)
    leaves = {
        "projected": torch.randn(2, 530, 700).to(dtype),
        "weight": torch.randn(600, 4),
        "bias": torch.randn(600),
        "state": torch.randn(2, 600, 3).to(dtype),
    }
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    starts = torch.rand(2, 530) < 0.1
    x = leaves["projected"][..., 50:650]
    options = {"initial_state": leaves["state"], "document_starts": starts}
    return results(causal_conv1d(x, leaves["weight"], leaves["bias"], **options), leaves)


def norm(dtype: torch.dtype, norm_before_gate: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    leaves = {
        "x": torch.randn(3, 70, 96).to(dtype),
        "projected": torch.randn(3, 70, 130).to(dtype),
        "weight": torch.randn(96),
    }
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    z = leaves["projected"][..., :96]
    options: dict[str, Any] = {"eps": 1e-5, "n_groups": 2, "norm_before_gate": norm_before_gate}
    gated = gated_rms_norm(leaves["x"], z, leaves["weight"], **options)
    return results((gated, rms_norm(leaves["x"], leaves["weight"], eps=1e-5, dtype=torch.float32)), leaves)


def norm_first(dtype: torch.dtype) -> list[Tensor]:
    return norm(dtype, norm_before_gate=True)


def scan(dtype: torch.dtype) -> list[Tensor]:
    """Groups, documents, an initial state, a padded chunk, x, B and C slices of one tensor."""
    torch.manual_seed(0)
    leaves = {
        "xBC": torch.randn(2, 300, 6 * 16 + 2 * 2 * 24).to(dtype),
        "dt": torch.rand(2, 300, 6).to(dtype),
        "A": -torch.rand(6) - 0.1,
        "D": torch.randn(6),
        "initial_state": torch.randn(2, 6, 16, 24),
    }
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    x, B, C = leaves["xBC"].split([96, 48, 48], dim=-1)
    x, B, C = x.unflatten(2, (6, 16)), B.unflatten(2, (2, 24)), C.unflatten(2, (2, 24))
    options = {"D": leaves["D"], "initial_state": leaves["initial_state"]}
    starts = torch.rand(2, 300) < 0.02
    y, state = ssd_scan(x, leaves["dt"], leaves["A"], B, C, document_starts=starts, **options)
    return results((y, state), leaves)


def scan_passes(dtype: torch.dtype) -> list[Tensor]:
    """The scan's passes without its matrix products."""
    torch.manual_seed(0)
    b, c, g, k, q, p, n = 2, 5, 2, 3, 32, 16, 24
    starts = torch.rand(b, c, q) < 0.05
    decays = -torch.rand(b, c, g, q, k), torch.rand(b, c, g, q, k)
    w = native_scan.weights(*decays, starts, dtype)
    x, other = torch.randn(2, b, c, g, q, k, p).to(dtype)
    span, scores, D = slice(1, 4), torch.randn(b, 3, g, q, q).to(dtype), torch.randn(g * k)
    scaled, per_head, dot = native_scan.split(x[:, span], w.outward[:, span], other[:, span])
    added, entering = torch.randn(2, b, 3, g, k, p, n).to(dtype)
    recurred = native_scan.recur_backward(torch.randn(b, g, k, p, n), w, span, added, entering)
    mixer = native_scan.mixer(scores, w, span, D)
    back = native_scan.mixer_backward(scores, torch.randn_like(mixer), w, span, D)
    assert torch.equal(back[0], mixer)
    out = torch.empty_like(x)
    arguments = (per_head, other[:, span].contiguous(), x[:, span], w, span)
    leaving = native_scan.join_backward(*arguments, out=out[:, span])
    ddecays = torch.empty(2, b, 3, g, q, k)
    assert dot is not None
    native_scan.decay_backward(w, span, (back[2], back[3], dot, leaving, recurred[2]), *ddecays)
    weights = [t for t in w if t is not None]
    return [*weights, scaled, per_head, dot, *recurred, mixer, *back, out[:, span], leaving, *ddecays]


OPERATORS: list[Run] = [conv, norm, norm_first]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.mark.parametrize("run", [*OPERATORS, scan], ids=lambda run: run.__name__)
@dtypes
def test_equals_the_pytorch_form(
    run: Run, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, check_close: Any
) -> None:
    assert build.usable(torch.zeros(1, dtype=dtype))
    compiled = run(dtype)
    monkeypatch.setenv(build.SWITCH, "0")
    assert not build.usable(torch.zeros(1, dtype=dtype))
    for index, (ours, pytorch) in enumerate(zip(compiled, run(dtype), strict=True)):
        assert ours.dtype == pytorch.dtype
        check_close(ours, pytorch, 1e-5 if dtype == torch.float32 else 1e-2, f"{run.__name__} {index}")


@pytest.mark.parametrize("run", [*OPERATORS, scan_passes], ids=lambda run: run.__name__)
@dtypes
def test_does_not_depend_on_the_number_of_threads(run: Run, dtype: torch.dtype) -> None:
    """Bit for bit, in the passes written here; PyTorch's sum of the tasks' shares is the same on few rows."""
    one = run(dtype)
    torch.set_num_threads(2)
    for first, second in zip(one, run(dtype), strict=True):
        assert torch.equal(first, second)


def test_threads_are_those_of_torch() -> None:
    """One OpenMP runtime in the process, the one libtorch is bound to."""
    code = (
        "import re, torch; from kernels.native import build; assert build.library() is not None;"
        "maps = open('/proc/self/maps').read();"
        r"runtimes = set(re.findall(r'\S*/lib(?:gomp|iomp|omp)\S*', maps));"
        "print(len(runtimes), build._openmp()[0].value is not None)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["1", "True"], done.stderr


def test_rounds_to_bf16_as_pytorch_does() -> None:
    """Ties, denormals, the largest numbers, infinities and NaN: a convolution with the tap 1 is a copy."""
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), dtype=torch.int64).int()
    bits[:256] = (bits[:256] & ~0xFFFF) | 0x8000  # ties
    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4e38, 1e-45]
    x = torch.cat([bits.view(torch.float32), torch.tensor(special)])[None]
    ones = torch.ones(x.shape[1])
    y = rms_norm(torch.ones_like(x).nan_to_num(), x[0], eps=0.0, dtype=torch.bfloat16)
    assert torch.equal(ones, rms_norm(ones[None], ones, eps=0.0)[0])  # N(1) is 1 exactly
    assert torch.equal(y[0].isnan(), x[0].isnan())
    seen = ~x[0].isnan()
    assert torch.equal(y[0][seen], x[0].bfloat16()[seen])


def test_silu_is_exact_to_fp32_rounding_everywhere() -> None:
    """From -100 to 100, relative to the value: a convolution whose only tap is 1."""
    x = torch.linspace(-100, 100, 200_001).view(1, -1, 1)
    weight = torch.tensor([[0.0, 1.0]])
    y, _ = causal_conv1d(x, weight)
    x64 = x.double()
    expected = x64 * x64.sigmoid()
    shown = x64 > -86  # below, e^x is smaller than any fp32 number that counts
    assert ((y - expected).abs() / expected.abs().clamp(min=1e-300))[shown].max() < 4e-7
    assert y[~shown].abs().max() < 1e-34


@pytest.mark.usefixtures("fresh_library")
@pytest.mark.parametrize("failure", ["missing", "failing"])
def test_without_a_working_compiler_pytorch_runs_and_one_line_says_so(
    failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, check_close: Any
) -> None:
    expected = conv(torch.float32)
    monkeypatch.setenv("LONGSTATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if failure == "failing":
        compiler = tmp_path / "cc"
        compiler.write_text("#!/bin/sh\necho 'conv.c:1: error: out of ink' >&2\nexit 1\n")
        compiler.chmod(0o755)
    build.library.cache_clear()
    with caplog.at_level(logging.WARNING):
        for ours, wanted in zip(conv(torch.float32), expected, strict=True):
            check_close(ours, wanted, 1e-5)
    (record,) = caplog.records
    wanted_words = "install gcc" if failure == "missing" else "out of ink"
    assert wanted_words in record.getMessage()
    assert not list(tmp_path.glob("cache/*"))


def test_processes_that_compile_at_once_all_get_a_whole_library(tmp_path: Path) -> None:
    code = "from kernels.native import build; assert build.library(); print(build.compiled())"
    environment = os.environ | {"LONGSTATE_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code]
    started = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = {process.communicate(timeout=300)[0].strip() for process in started}
    (library,) = tmp_path.iterdir()
    assert printed == {str(library)}


@pytest.mark.parametrize(
    ("features", "native"),
    [({"avx2"}, False), ({"avx2", "avx512_bf16"}, True), ({"amx_bf16"}, True), (set(), True)],
)
def test_bf16_of_the_cpu(features: set[str], native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "cpu_features", lambda: frozenset(features))
    assert cpu.has_native_bf16() == native


def test_importing_compiles_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"LONGSTATE_CACHE": str(tmp_path)}
    code = "import lightning_modules.backbone"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=300)
    assert not list(tmp_path.iterdir())

"""The benchmark of the operators: what can be checked without a GPU, and a short run with one."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import bench, warmup
from kernels.benchmarks import check, costs, operators, report, rivals, training
from kernels.benchmarks.costs import Cost, Machine
from kernels.benchmarks.inputs import cotangent, leaves, scan_inputs
from kernels.benchmarks.operators import BenchConfig
from kernels.benchmarks.ops import OPS, Inputs, Outputs
from kernels.benchmarks.rivals import Contender
from kernels.benchmarks.shapes import LAYOUTS, SCAN, Shape
from kernels.benchmarks.suite import chosen

ROOT = Path(__file__).parents[2]
TINY = Shape.parse("B2 T70 H4 P16 N16")
H200 = Machine("H200", copy=4.25e12, matmul=678e12)


def run_bench(path: Path, *arguments: str) -> list[dict[str, Any]]:
    """Rows of `python -m kernels.bench`."""
    command = [sys.executable, "-m", "kernels.bench", *arguments, f"json={path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())["rows"]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused(main, *argv)`: the one line with which an entry point ends."""

    def run(main: Callable[[], None], *argv: str) -> str:
        monkeypatch.setattr(sys, "argv", ["program", *argv])
        with pytest.raises(SystemExit) as exit:
            main()
        assert exit.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    return run


def test_shapes_read_as_they_print() -> None:
    for shape in (*SCAN, Shape(groups=4, d_state=16)):
        assert Shape.parse(str(shape)) == shape
    assert Shape.parse("B8T4096H24") == Shape(batch=8, length=4096, heads=24)
    assert Shape.parse("T10").d_in_proj == 4384


@pytest.mark.parametrize("text", ["", "8x4096", "B8 B9", "B0", "H6 G4", "B8 T4096 H24x"])
def test_bad_shapes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="shapes="):
        Shape.parse(text)


def test_costs_are_those_counted_by_hand() -> None:
    """Layer of 32 heads of 64, d_state 128: 8,768 B and 1.33 MFLOP a token forward, 13,440 B backward."""
    shape = Shape.parse("B1 T32768")
    state = 32 * 64 * 128 * 4
    assert costs.scan(shape) == Cost(32768 * 8768 + state, 32768 * 1_327_104)
    assert costs.scan_backward(shape).bytes == 32768 * 13_440
    assert OPS["scan_backward"].cost(shape).bytes == 32768 * (8768 + 13_440) + state
    assert costs.step(Shape(batch=3, length=1)).bytes == 3 * (2 * state + 2 * (2 * 2048 + 2 * 128 + 32))
    assert OPS["add_norm"].cost(shape).bytes == 32768 * 1024 * 12
    assert OPS["add_norm_backward"].cost(shape).bytes == 32768 * 1024 * (12 + 16)
    assert OPS["head_backward"].cost(shape).flops == 3 * 2 * 32768 * 50288 * 1024
    assert H200.limit(Cost(8_500_000_000, 0)) == pytest.approx(2e-3)
    assert H200.limit(Cost(1, 678_000_000_000)) == pytest.approx(1e-3)


def test_sliced_inputs_are_views_of_what_the_layer_makes() -> None:
    shape = next(s for op, s in chosen(["scan"], ["B2 T8"], ["sliced"]))
    given = scan_inputs(shape, "cpu")
    assert given["x"].stride()[:2] == (8 * 2304, 2304)
    assert given["B"].stride(1) == given["C"].stride(1) == 2304
    assert given["dt"].stride(1) == 4384


@pytest.mark.parametrize("name", [n for n in OPS if OPS[n].layouts == LAYOUTS])
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_operators_agree_with_their_oracles(name: str, layout: str) -> None:
    ((op, shape),) = chosen([name], [str(TINY)], [layout])
    found = check.error(op, Contender("ours", op.ours), shape, "cpu")
    assert found is not None
    assert 0 < found < check.TOLERANCE


@pytest.mark.parametrize(
    "name", ["add_norm", "add_norm_backward", "head", "head_backward", "layer", "layer_backward"]
)
def test_operators_of_one_layout_agree_with_their_oracles(name: str) -> None:
    found = check.error(OPS[name], Contender("ours", OPS[name].ours), TINY, "cpu")
    assert found is not None
    assert 0 < found < check.TOLERANCE


@pytest.mark.parametrize(
    "name",
    ["conv", "conv_backward", "norm", "norm_backward", "add_norm", "add_norm_backward", "head_backward"],
)
def test_torch_peers_compute_the_operator(name: str) -> None:
    (peer,), absent = rivals.contenders(OPS[name].base, ["torch"])
    assert not absent
    found = check.error(OPS[name], peer, TINY, "cpu")
    assert found is not None
    assert 0 < found < check.TOLERANCE


def test_a_wrong_result_is_not_timed() -> None:
    def forgetful(given: Inputs) -> Outputs:
        y, state = OPS["scan"].ours(given)
        return y, state * 1.05

    with pytest.raises(ArithmeticError, match="output 1 differs"):
        check.error(OPS["scan"], Contender("ours", forgetful), TINY, "cpu")

    def blind(given: Inputs) -> Outputs:
        return OPS["scan"].ours(given | {"D": given["D"].detach() + 0 * given["D"]})

    with pytest.raises(ArithmeticError, match="gradient of D differs"):
        check.error(OPS["scan_backward"], Contender("ours", blind), TINY, "cpu")


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    rivals._mamba.cache_clear()
    monkeypatch.delitem(sys.modules, "mamba_ssm", raising=False)
    found, absent = rivals.contenders("scan", ["mamba_ssm", "torch"])
    assert (found, absent) == ([], {"mamba_ssm": "not installed"})
    lines = list(operators.absent(chosen(["scan", "norm"], [], ["contiguous"]), ["mamba_ssm"]))
    assert lines == ["mamba_ssm: absent (not installed)"]


def row(system: str, ms: float | None, **more: Any) -> dict[str, Any]:
    values = {
        "spread_ms": 0.01,
        "host_ms": 0.1,
        "share_of_limit": 0.3,
        "gb_per_s": 1200.0,
        "tflop_per_s": 200.0,
    }
    values |= {"temporaries_mib": 3.0, "launches": 4, "first_call_s": 1.5, "ratio": 2.0, "error": ""}
    values |= {"op": "scan", "shape": "B8 T4096 H32 P64 N128", "layout": "sliced", "variant": ""}
    return values | {"system": system, "ms": ms, "limit_ms": 0.07, "oracle_error": 1e-3} | more


def test_report_shows_failures_beside_numbers(tmp_path: Path) -> None:
    from rich.console import Console

    failed = row("fla", None, error="RuntimeError: refused", ratio=None, op="norm")
    rows = [row("ours", 0.2), row("mamba_ssm", 0.4, variant="chunk 256"), failed]
    console = Console(width=220, record=True, file=io.StringIO())
    console.print(report.table(rows))
    text = console.export_text()
    assert "0.4000" in text
    assert "mamba_ssm chunk 256" in text
    assert "RuntimeError: refused" in text
    assert "failed: RuntimeError: refused" in report.line(failed)
    assert report.figure(rows, tmp_path / "bench.png").stat().st_size > 5000
    report.write(tmp_path / "bench.json", asdict(BenchConfig()), H200, rows)
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == rows


def test_the_fastest_variant_that_works_stands_for_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"": 2.0, "chunk 64": None, "chunk 128": 5.0, "chunk 256": 4.0}

    def fake(op: Any, shape: Shape, contender: Contender, *rest: Any) -> dict[str, Any]:
        return {"system": contender.system, "variant": contender.variant, "ms": times[contender.variant]}

    peers = [Contender("mamba_ssm", OPS["scan"].ours, v) for v in times if v]
    monkeypatch.setattr(operators, "_row", fake)
    monkeypatch.setattr(operators.rivals, "contenders", lambda base, systems: (peers, {}))
    ours, peer = operators.measured(OPS["scan"], TINY, BenchConfig(), H200)
    assert (ours["system"], ours["ratio"]) == ("ours", 1.0)
    assert (peer["variant"], peer["ratio"]) == ("chunk 256", 2.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no GPU")
def test_a_failure_is_a_row() -> None:
    ours = Contender("ours", OPS["scan"].ours)
    found = operators._row(OPS["scan"], TINY, ours, BenchConfig(check=False), H200)
    assert found["ms"] is None
    assert found["error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no GPU")
def test_without_a_gpu_one_line_says_so(refused: Callable[..., str]) -> None:
    assert "needs a CUDA device" in refused(bench.main, "suite=ops")
    assert "needs a CUDA device" in refused(warmup.main)


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("suite=op", "model, ops"),
        ("ops=[skan]", "ops=skan"),
        ("peers=[me]", "peers"),
        ("shapes=[X1]", "shapes=X1"),
        ("layouts=[round]", "layouts=round"),
        ("seconds=0", "seconds=0"),
    ],
)
def test_bad_settings_end_in_one_line(refused: Callable[..., str], argument: str, named: str) -> None:
    assert named in refused(bench.main, "suite=ops", argument)


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU the model is the default")
def test_the_suite_follows_the_machine() -> None:
    assert bench.suite_of(["d_model=64"]) == "model"
    assert bench.suite_of(["suite=ops", "rounds=1"]) == "ops"


@pytest.mark.slow
def test_training_at_two_lengths(tmp_path: Path) -> None:
    sizes = ("d_model=64", "n_layers=1", "d_state=16", "headdim=32", "vocab_size=64")
    path, cut = tmp_path / "training.json", ("lengths=[64,256]", "at_once=128", "rounds=1")
    rows = run_bench(path, "suite=training", *sizes, *cut, "peers=[]")
    assert [(row["rows"], row["segment"]) for row in rows] == [(2, None), (1, 128)]
    assert all(row["tokens_per_second"] > 0 and row["peak_gib"] > 0 for row in rows)


def test_no_column_of_training_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a terminal nor its width is there: the largest numbers as they are."""
    numbers = (2.0, 1.9, 1_234_567.0, 131.25, 612.3e12)
    rows = [training.Row("ours", 1_048_576, 1, 131_072, False, *numbers)]
    rows += [training.Row("mamba_ssm", 1_048_576, 1, 131_072, True, *numbers)]
    training.show(rows, 700e12)
    shown = capsys.readouterr().out
    assert "\u2026" not in shown
    for words in ("launched", "TFLOP/s", "1,048,576", "131,072", "as a graph", "by kernel", "mamba_ssm"):
        assert words in shown
    assert all(words in shown for words in ("1,234,567", "95%", " 612 ", "87%", "131.2", "1.00x"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["lengths=[100]", "at_once=64"], "lengths=[100]: must divide at_once=64 or be multiples of it"),
        (["at_once=0"], "at_once=0: must be at least 1"),
        (["cuda_graphs=true"], "cuda_graphs=true: needs a CUDA device: leave it out"),
    ],
)
def test_training_refuses_what_cannot_be(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, settings: list[str], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(bench.main, "suite=training", *settings) == f"error: {said}\n"


def test_model_suite_keeps_its_arguments_and_rows(tmp_path: Path) -> None:
    sizes = ("d_model=32", "n_layers=1", "d_state=16", "headdim=16", "length=256", "rounds=1")
    rows = run_bench(tmp_path / "model.json", *sizes, "suite=model", "peers=[plain]")
    assert {(r["system"], r["precision"]) for r in rows} == {
        (system, precision) for system in ("ours", "plain") for precision in ("fp32", "bf16")
    }
    assert all(r["tokens_per_second"] > 0 and r["peak_mib"] >= 0 for r in rows)


def test_every_leaf_of_the_layer_gets_a_gradient() -> None:
    op = OPS["layer_backward"]
    given, call = op.inputs(TINY, "cpu"), op.call(op.ours)
    prepared = call.prepared(given, cotangent(given))
    results = call(prepared)
    assert len(results) == 1 + len(leaves(prepared))  # the output, and no leaf but the inputs
    assert all(t.abs().sum() > 0 for t in results)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_short_run_on_the_gpu(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    rows = run_bench(path, "suite=ops", "shapes=[B2 T512 H8]", "seconds=0.02")
    ours = [r for r in rows if r["system"] == "ours"]
    assert {r["op"] for r in ours} == set(OPS)
    assert not [r["error"] for r in ours if r["error"]]
    assert path.with_suffix(".png").is_file()

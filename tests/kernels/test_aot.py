"""Kernels compiled for a GPU that is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kernels import aot

ROOT = Path(__file__).parents[2]
# Bytes a thread that kernels spill at the first shape of the benchmark, at most; all others spill nothing.
SPILLS = {"hopper_gradient_kernel": 240}


def run(*command: str) -> str:
    """Run Python from the repository root with kernels that are compiled, not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def examples() -> dict[str, Any]:
    return json.loads(run(str(ROOT / "tests" / "kernels" / "aot_examples.py")).splitlines()[-1])


def test_verdicts_on_kernels_whose_fate_is_known(examples: dict[str, Any]) -> None:
    assert examples["fits"]["verdict"] == "ok"
    assert 16 <= examples["fits"]["registers"] <= 255
    assert 0 < examples["fits"]["shared"] <= aot.SHARED_LIMIT
    assert examples["spills"]["verdict"] == "spills"
    assert examples["too big"]["verdict"] == "too much shared memory"
    assert examples["wrong"]["verdict"].startswith("failed: CompilationError")


def test_specialisation_is_that_of_tritons_launcher(examples: dict[str, Any]) -> None:
    ours, theirs = examples["specialisations"]
    assert ours == theirs
    assert ["one", "constexpr"] in ours[0]
    assert "p" in ours[1]
    assert "q" not in ours[1]


def compile_all(path: Path, *arguments: str) -> list[dict[str, Any]]:
    run("-m", "kernels.aot", f"json={path}", *arguments)
    rows = json.loads(path.read_text())
    assert rows
    return rows


def told(rows: list[dict[str, Any]]) -> str:
    return "\n".join(f"{r['kernel']} {r['shape']} {r['settings']}: {r['verdict']}" for r in rows)


def test_default_settings_fit_at_the_first_shape(tmp_path: Path) -> None:
    ops = "ops=[scan_backward,conv_backward,norm_backward,add_norm_backward]"
    rows = compile_all(tmp_path / "aot.json", ops, "shapes=[B8 T4096]", "configs=1")
    assert len({r["kernel"] for r in rows}) >= 8
    assert not (bad := [r for r in rows if r["verdict"] not in ("ok", "spills")]), told(bad)
    worse = [r for r in rows if r["spilled_bytes"] > SPILLS.get(r["kernel"], 0)]
    assert not worse, told(worse)


@pytest.mark.slow
def test_every_setting_compiles_and_fits_at_every_shape_of_the_benchmark(tmp_path: Path) -> None:
    rows = compile_all(tmp_path / "aot.json")
    assert not (bad := [r for r in rows if r["verdict"] not in ("ok", "spills")]), told(bad)


@pytest.mark.parametrize("argument", ["ops=[skan]", "shapes=[B0]", "configs=9"])
def test_bad_settings_end_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argument: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["aot", argument])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as exit:
        aot.main()
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert argument.removesuffix("]").replace("[", "") in said
    assert said.count("\n") == 1

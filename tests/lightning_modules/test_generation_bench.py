"""A token behind many tokens costs what one behind few costs."""

import json
from pathlib import Path

import numpy as np
import pytest

from conf.generate_schema import GenerationBenchConfig
from conf.schema import ModelConfig
from lightning_modules.generation.bench import BLOCK, bench, random_tokens
from lightning_modules.generation_bench import main

SMALL = ModelConfig(d_model=16, headdim=8, d_state=8)


def test_numbers_by_position(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bench.json"
    sizes = ["model.d_model=16", "model.headdim=8", "model.d_state=8", "threads=1", "batch_size=2"]
    main([*sizes, "positions=[10,500]", "tokens=5", "rounds=2", f"output={output}"])
    result = json.loads(output.read_text())
    near, far = result["positions"]
    assert (near["position"], far["position"]) == (10, 500)
    assert near["speed_against_first"] == 1.0
    assert near["state_bytes"] == far["state_bytes"]
    assert min(near["tokens_per_second"], far["tokens_per_second"]) > 0
    assert "tokens before" in capsys.readouterr().out


@pytest.mark.parametrize("setting", ["positions=[]", "positions=[0]", "rounds=0", "model.headdim=7"])
def test_mistakes_are_told_in_one_line(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([setting])
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("output", ["none/bench.json", "", "file/bench.json"])
def test_a_place_that_cannot_be_written_is_told_before_any_work(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("lightning_modules.generation.bench.Mamba2LM", None)  # what the work begins with
    with pytest.raises(SystemExit):
        main([f"output={tmp_path}/{output}"])
    error = capsys.readouterr().err
    assert error.startswith(f"error: output={tmp_path}/{output}: cannot be written (")
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]


def test_any_stretch_of_the_tokens_is_cut_from_one_text() -> None:
    source = random_tokens(3, 2, 50)
    whole = source(0, 3 * BLOCK)
    assert whole.shape == (2, 3 * BLOCK)
    for begin, end in ((0, 1), (BLOCK - 1, BLOCK + 1), (BLOCK, 2 * BLOCK), (100, 2 * BLOCK + 5)):
        np.testing.assert_array_equal(source(begin, end), whole[:, begin:end])


@pytest.mark.slow
def test_speed_does_not_depend_on_what_was_read() -> None:
    """Medians of rounds in turn; 5% is what the command shows on an idle machine."""
    config = GenerationBenchConfig(positions=[1024, 131_072], tokens=50, rounds=31, threads=1, model=SMALL)
    assert bench(config)["positions"][1]["speed_against_first"] == pytest.approx(1.0, abs=0.1)

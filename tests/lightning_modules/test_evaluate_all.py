"""mitigation.name=all: one table of every mitigation, from the same prompts, that goes on after a kill."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.bench import bench_mitigations, default_settings
from conf.load import parse
from conf.mitigation import MITIGATIONS
from conf.schema import TrainConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.checkpoints import save_model
from lightning_modules.evaluate import main
from lightning_modules.evaluation import suites
from lightning_modules.evaluation.bench_report import compare, tables
from lightning_modules.mlflow_store import connect

pytestmark = [
    # MLflow's own queries, on SQLAlchemy 2.1, and its log_table, on pandas 3.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
    pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes"),
]
TINY = ("model.d_model=16", "model.d_state=8", "model.headdim=8", "model.chunk_size=16")
QUICK = (
    *("passkey.lengths=[256,128]", "passkey.prompts=2", "passkey.depths=1", "passkey.prompts_per_depth=2"),
    *("loss.length=300", "loss.prompts=1"),
)
UNTRACKED = "tracking.enabled=false"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = parse(TrainConfig, [*TINY, "data.train_length=128"])
    torch.manual_seed(0)
    save_model(Mamba2LM(config.model), tmp_path / "model", config)
    return tmp_path / "model"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def test_every_mitigation_is_measured_on_the_same_prompts(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, store = tmp_path / "bench", f"sqlite:///{tmp_path}/mlflow.db"
    command = [f"checkpoint={checkpoint}", f"run_dir={run_dir}", f"tracking.uri={store}", *QUICK]
    main([*command, "mitigation.name=all"])
    report = read_json(run_dir / "bench.json")
    rows = report["rows"]
    assert [row["mitigation"]["name"] for row in rows] == ["none", *default_settings(128)]
    plain = [f"checkpoint={checkpoint}", f"run_dir={tmp_path / 'plain'}", UNTRACKED, *QUICK]
    main(plain)
    alone = read_json(tmp_path / "plain" / "evaluation.json")
    assert (rows[0]["passkey"], rows[0]["loss"]) == (alone["passkey"], alone["loss"])
    for row in rows:
        assert [one["length"] for one in row["passkey"]["recent"]] == [128, 256]
        assert row["loss"]["position"] == rows[0]["loss"]["position"]
        change = row["metrics"]["loss/in_length"] - rows[0]["metrics"]["loss/in_length"]
        assert row["metrics"]["change/loss_in_length"] == pytest.approx(change)
        assert row["metrics"]["speed/tokens_per_second"] > 0
        assert row["metrics"]["memory/peak_mib"] > 0
        assert read_json(run_dir / row["run_dir"] / "evaluation.json")["loss"] == row["loss"]
    windowed = next(row for row in rows if row["mitigation"]["name"] == "sliding_window")
    state = "memory/state_mib_per_sequence"
    assert windowed["metrics"][state] > rows[0]["metrics"][state]
    assert (run_dir / "figures" / "bench.png").stat().st_size > 10_000
    printed, errors = capsys.readouterr()
    assert errors == ""
    for words in (
        "Recent needles",
        "Needles at any depth",
        "hard_reset (every 96)",
        "token_filter (calibrated)",
    ):
        assert words in printed

    client = connect(store)
    result = read_json(run_dir / "result.json")
    run = client.get_run(result["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["none/loss/in_length"] == rows[0]["metrics"]["loss/in_length"]
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert names >= {"bench.json", "bench_table.json", "config.yaml", "figures"}
    children = client.search_runs(
        [run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
    )
    assert {child.data.tags["mitigation"] for child in children} == {"none", *MITIGATIONS}


def test_a_killed_comparison_goes_on_where_it_was(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    only = ("bench.state_norm=null", "bench.token_filter=null", "bench.sliding_window=null")
    command = [f"checkpoint={checkpoint}", "mitigation.name=all", UNTRACKED, *QUICK, *only]
    run, calls = suites.LossSuite.run, []

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return run(*arguments)

    monkeypatch.setattr(suites.LossSuite, "run", killed)
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 128 + signal.SIGTERM
    (run_dir,) = Path("runs").iterdir()
    finished = {path: path.stat().st_mtime_ns for path in run_dir.glob("*/result.json")}
    assert len(finished) == 2
    capsys.readouterr()
    main(command)
    assert len(calls) == 3 + 3
    assert capsys.readouterr().out.count("was measured before") == 2
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert len(read_json(run_dir / "bench.json")["rows"]) == 5
    main(command)
    assert len(calls) == 6
    assert [path.name for path in Path("runs").iterdir()] == [run_dir.name]


def test_settings_replace_defaults_and_lists_are_swept() -> None:
    chosen = {
        "sliding_window": {"window": [16, 64]},
        "state_norm": None,
        "token_filter": None,
        "forget_more": {"alpha_scale": [0.99, 0.9], "insert_scale": [1.0, 0.5]},
        "hard_reset": {"every": 9, "heads": ["L0H1", "L1H0"]},
    }
    found = bench_mitigations(chosen, 128)
    assert [rule.window for rule in found if rule.name == "sliding_window"] == [16, 64]
    factors = [(rule.alpha_scale, rule.insert_scale) for rule in found if rule.name == "forget_more"]
    assert factors == [(0.99, 1.0), (0.99, 0.5), (0.9, 1.0), (0.9, 0.5)]
    (reset,) = (rule for rule in found if rule.name == "hard_reset")
    assert reset.heads == ["L0H1", "L1H0"]
    assert {rule.name for rule in found} == set(MITIGATIONS) - {"state_norm", "token_filter"}
    bench_mitigations({}, 1)  # defaults hold at any training length


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["bench.forget_mor={}"], "bench.forget_mor={}: is no mitigation; choose from forget_more"),
        (["bench.forget_more=0.9"], "bench.forget_more=0.9: give settings"),
        (["bench.forget_more.alpha_scale=[0.9,1.5]"], "bench.forget_more: mitigation.alpha_scale=1.5"),
        (["bench.forget_more.alpha=0.9"], "bench.forget_more: alpha: Key 'alpha' not in"),
        (["mitigation.alpha_scale=0.9"], "mitigation.alpha_scale=0.9: belongs to forget_more"),
        (["bench.hard_reset={every: 3, heads: [L7H0]}"], "mitigation.heads=L7H0: the layers are 0 to 1"),
        (["run_dir=RUN"], "belongs to a training run"),
    ],
)
def test_a_users_mistake_is_answered_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    (tmp_path / "trained" / "checkpoints").mkdir(parents=True)
    overrides = [override.replace("RUN", str(tmp_path / "trained")) for override in overrides]
    command = [f"checkpoint={checkpoint}", "mitigation.name=all", f"run_dir={tmp_path / 'out'}", UNTRACKED]
    with pytest.raises(SystemExit) as stop:
        main([*command, "bench.state_norm=null", "bench.token_filter=null", *QUICK, *overrides])
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1), error
    assert message in error
    assert not (tmp_path / "out").exists()


def test_what_was_not_measured_is_left_out_of_the_table() -> None:
    """A documents model has no passkeys, a system that keeps its peak to itself no memory."""
    loss = {"position": [1.0], "loss": [2.0], "length": 1}
    evaluation = {
        "mitigation": {"name": "none"},
        "passkey": None,
        "loss": loss,
        "tasks": {},
        "conclusion": {},
    }
    rows = compare([(evaluation, {"loss/in_length": 2.0}), (evaluation, {"loss/in_length": 2.5})])
    assert rows[1]["metrics"]["change/loss_in_length"] == 0.5
    (table,) = tables({"rows": rows, "train_length": 128})
    assert [column.header for column in table.columns] == ["", "loss in length", "change"]

"""A study of capacity over stand-in models: the plan grows, survives a budget and a kill, and ends alike."""

import csv
import json
import signal

import pytest

from sweeps.endings import GOES_ON
from sweeps.stores.store import stage_name
from sweeps.stores.studies import load_studies
from tests.sweeps.conftest import SweepProcess

STUDY = """\
name: tiny
train:
  base: base.yaml
  tokens_per_step: 4096
  seeds: [0, 1]
capacity:
  series: {d_state: {model.d_state: [8, 32]}}
  lengths: [128, 256, 512, 1024, 2048]
  coarse: 3
  retry_lr: [0.5]
  resamples: 3
evaluate: {suites: [passkey]}
workers: 4
tracking: {enabled: false}
"""
LAW = {"COLLAPSE_BELOW": "30", "UNSOLVED_SEED": "1"}  # T_forget: 240 and 960; every first try of seed 1 fails


@pytest.fixture
def study(sweep: SweepProcess) -> SweepProcess:
    (sweep.folder / "sweep.yaml").write_text(STUDY)
    return sweep


def rows(study: SweepProcess) -> list[dict[str, str]]:
    with (study.study_dir / "results.csv").open() as file:
        return list(csv.DictReader(file))


def outcomes(study: SweepProcess) -> dict[tuple[str, ...], str]:
    keys = ("size", "train_length", "seed", "attempt")
    return {tuple(row[key] for key in keys): row["outcome"] for row in rows(study)}


@pytest.mark.timeout(300)
def test_search_grows_stops_with_its_budget_and_goes_on_to_the_same_end(study, tmp_path):
    slow = {"step_seconds": 0.05, **LAW}
    first = study.run("budget_minutes=0.1", status=GOES_ON, **slow)
    assert "Stopped after budget_minutes=0.1" in first
    assert "To go on:" in first
    assert "What there is so far:  runs/tiny/report.html" in first
    for name in ("report.html", "report.txt"):
        assert "The search goes on" in (study.study_dir / name).read_text()
    assert (study.study_dir / "results.csv").exists()
    study.start(**slow)
    study.wait_for(lambda: list(study.study_dir.glob("capacity/trial-*/result.json")))
    study.process.send_signal(signal.SIGKILL)
    study.process.communicate()
    output = study.run(**LAW)
    assert "The search has ended" in output

    found = outcomes(study)
    assert len({row["run_dir"] for row in rows(study)}) == len(found), "no run was done twice"
    assert {key[3] for key in found if key[2] == "1"} == {"0", "1"}, "unsolved, then tried again"
    for n, bracket in (("8", "128-256"), ("32", "512-1,024")):
        (line,) = (line for line in output.splitlines() if f"d_state {n} " in line and "-" in line)
        assert line.count(bracket) == 2, "both seeds"
    blind = 2 * 5 * 2 * 1.5  # with the retries of seed 1
    assert len(found) < blind

    trials = next(s for s in load_studies(study.study_dir) if stage_name(s) == "capacity").get_trials()
    retried = next(t for t in trials if json.loads(t.user_attrs["plan"])["attempt"] == 1)
    assert retried.user_attrs["seed"] == 1001
    config = (study.study_dir / "capacity" / f"trial-{retried.number:04d}" / "config.yaml").read_text()
    assert "lr: 0.001\n" in config  # the default's half
    assert f"batch_size: {4096 // retried.user_attrs['point']['data.train_length']}\n" in config

    html = (study.study_dir / "report.html").read_text()
    figures = ("surface-d_state", "laws-d_state", "residuals-d_state", "importances", "parallel_coordinates")
    assert all((study.study_dir / "figures" / f"{name}.png").exists() for name in figures)
    assert html.count("data:image/png;base64,") == len(figures)
    assert study.run(**LAW).count("done  ") == 0, "started again, it has nothing to do"


@pytest.mark.timeout(120)
def test_a_run_that_fails_stops_its_own_search_only_and_is_tried_at_the_next_start(study: SweepProcess):
    """One size cannot be trained: the other is searched, the report names what failed."""
    broken, settings = (
        {"FAIL_IF": "model.d_state=8", **LAW},
        ("train.seeds=[0]", "capacity.lengths=[128,512]"),
    )
    output = study.run("max_failures=100", *settings, status=1, **broken)
    assert "Failed runs: 2" in output
    assert "The search goes on" in output
    assert "loss is not finite in layer 3" in output
    assert any("d_state 32 " in line and ">512" in line for line in output.splitlines())
    mended = study.run("max_failures=100", "train.seeds=[0]", "capacity.lengths=[128,512,1024]", **LAW)
    assert "2 failed trials are tried again" in mended
    assert "The search has ended" in mended
    assert any("d_state 32 " in line and "512-1,024" in line for line in mended.splitlines()), (
        "a longer range"
    )

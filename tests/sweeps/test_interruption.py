"""A sweep killed at any level goes on with the same command: nothing lost, nothing twice, no orphan."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import psutil
import pytest
from mlflow.tracking import MlflowClient
from optuna.trial import TrialState

from sweeps.endings import GOES_ON
from sweeps.stores.studies import load_studies
from tests.sweeps.conftest import ROOT


def states(study_dir: Path, name: str = "train") -> list[TrialState]:
    return [trial.state for trial in study_of(study_dir, name).get_trials(deepcopy=False)]


def study_of(study_dir: Path, name: str = "train") -> optuna.Study:
    return next(study for study in load_studies(study_dir) if study.study_name == name)


def starts(study_dir: Path) -> list[int]:
    """How often each training trial was started, least first."""
    return sorted(len(file.read_text().splitlines()) for file in study_dir.glob("train/trial-*/starts"))


TRACKED = ("tracking.enabled=true", "tracking.uri=sqlite:///mlflow.db")


def stage_status(sweep) -> str:
    """Status of the one MLflow run of the training stage."""
    client = MlflowClient(tracking_uri=f"sqlite:///{sweep.folder}/mlflow.db")
    experiment = client.get_experiment_by_name("longstate")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "tiny/train"
    return run.info.status


def assert_complete(study_dir: Path) -> None:
    """The three points once each, and of each trial every step once."""
    assert states(study_dir) == [TrialState.COMPLETE] * 3
    assert len({trial.user_attrs["plan"] for trial in study_of(study_dir).get_trials()}) == 3
    steps = [len(file.read_text().splitlines()) for file in study_dir.glob("train/trial-*/metrics.jsonl")]
    assert steps == [10] * 3


def test_undisturbed_sweep_runs_every_stage_and_again_does_nothing(sweep):
    output = sweep.run("mitigation.yaml")
    assert_complete(sweep.study_dir)
    assert states(sweep.study_dir, "mitigation-0001") == [TrialState.COMPLETE] * 3  # baseline, two settings
    assert states(sweep.study_dir, "confirm-0001") == [TrialState.COMPLETE] * 3
    assert "Best setting: forget_more alpha_scale 0.999" in output

    results = {path: path.stat().st_mtime_ns for path in sweep.study_dir.glob("*/trial-*/result.json")}
    assert len(results) == 9
    assert "Best setting: forget_more alpha_scale 0.999" in sweep.run("mitigation.yaml")
    assert results == {
        path: path.stat().st_mtime_ns for path in sweep.study_dir.glob("*/trial-*/result.json")
    }


def test_killed_worker_takes_its_trial_along_and_both_kinds_of_killed_trial_go_on(sweep):
    sweep.start(step_seconds=0.3)
    sweep.wait_until_training(trials=2)
    trials = [process.pid for process in sweep.processes("lightning_modules.train")]
    sweep.kill("sweeps.worker")
    sweep.wait_for(lambda: not all(map(psutil.pid_exists, trials)))
    (survivor,) = [process for process in sweep.processes("lightning_modules.train") if process.pid in trials]
    survivor.kill()
    sweep.finish()
    assert_complete(sweep.study_dir)
    assert starts(sweep.study_dir) == [1, 2, 2]


def test_killed_sweep_leaves_no_orphan_and_the_same_command_goes_on(sweep):
    process = sweep.start(step_seconds=0.3)
    sweep.wait_until_training(trials=2)
    process.kill()
    process.communicate()
    sweep.wait_until_gone("sweeps.worker")
    sweep.wait_until_gone("lightning_modules.train")
    assert states(sweep.study_dir) == [TrialState.WAITING] * 3  # its workers were told, and put them back
    sweep.run()
    assert_complete(sweep.study_dir)
    assert starts(sweep.study_dir) == [1, 2, 2]


def test_everything_killed_at_once_is_reconciled_and_goes_on(sweep):
    """No process is left to put anything back: what remains is repaired, once, and continued."""
    process = sweep.start(*TRACKED, step_seconds=0.3)
    sweep.wait_until_training(trials=2)
    doomed = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in doomed:
        one.suspend()  # nobody learns of another's death
    for one in doomed:
        one.kill()
    process.communicate()
    sweep.wait_until_gone("lightning_modules.train")
    assert states(sweep.study_dir).count(TrialState.RUNNING) == 2
    command = [sys.executable, "-m", "sweeps.reconcile", f"study={sweep.study_dir}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    printed = [
        subprocess.run(command, cwd=sweep.folder, env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    lines = printed[0].stdout.splitlines()
    assert [line for line in lines if "its worker is gone; it waits" in line] == lines[:2]
    assert "(tiny/train): was RUNNING; set to KILLED" in lines[2]
    assert lines[3:] == ["3 repaired."]
    assert printed[1].stdout == "Nothing to repair.\n"
    assert states(sweep.study_dir) == [TrialState.WAITING] * 3
    sweep.run(*TRACKED)
    assert_complete(sweep.study_dir)
    assert starts(sweep.study_dir) == [1, 2, 2]
    assert stage_status(sweep) == "FINISHED"
    holders = [len(trial.user_attrs["holders"]) for trial in study_of(sweep.study_dir).get_trials()]
    assert sorted(holders) == [1, 2, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_interrupted_sweep_stops_its_processes_and_says_how_to_go_on(sweep, number):
    process = sweep.start(*TRACKED, step_seconds=0.3)
    sweep.wait_until_training(trials=2)
    process.send_signal(number)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 128 + number
    assert "To go on:  python -m sweeps.run sweep.yaml tracking.enabled=true" in output
    assert "Traceback" not in output
    sweep.wait_until_gone("sweeps.worker", seconds=1)
    sweep.wait_until_gone("lightning_modules.train", seconds=1)
    assert states(sweep.study_dir) == [TrialState.WAITING] * 3  # two of them to be continued
    assert stage_status(sweep) == "KILLED"


@pytest.mark.parametrize("minutes", [0.0001, 0.05], ids=["before anything", "in the middle"])
def test_budget_of_a_start_leaves_a_report_of_what_there_is(sweep, minutes):
    output = sweep.run(f"budget_minutes={minutes}", "workers=1", status=GOES_ON, step_seconds=0.3)
    assert f"Stopped after budget_minutes={minutes:g}" in output
    assert "What there is so far:  runs/tiny/report.html" in output
    for name in ("report.html", "report.txt", "results.csv"):
        assert (sweep.study_dir / name).exists()
    sweep.wait_until_gone("lightning_modules.train", seconds=1)


def test_failed_trial_is_named_with_its_last_words_and_tried_again_by_the_next_start(sweep):
    output = sweep.run("workers=1", status=1, FAIL_IF="model.d_state=64")
    assert "train/trial-0001  train: exit status 1: error: loss is not finite in layer 3" in output
    assert states(sweep.study_dir) == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    output = sweep.run()
    assert "train: 1 failed trials are tried again" in output
    assert "Failed trials" not in output
    assert states(sweep.study_dir)[3:] == [TrialState.COMPLETE]
    assert study_of(sweep.study_dir).get_trials()[3].user_attrs["retry_of"] == 1


def test_sweep_stops_after_several_failures_in_a_row(sweep):
    output = sweep.run("max_failures=2", "workers=1", status=1, FAIL_EVALUATE="1")
    assert "stopped after 2 failed trials in a row (max_failures)" in output
    assert states(sweep.study_dir) == [TrialState.FAIL, TrialState.FAIL, TrialState.WAITING]


def test_second_sweep_on_one_study_is_refused_and_so_is_another_config(sweep):
    process = sweep.start(step_seconds=1)
    sweep.wait_for(lambda: (sweep.study_dir / "journal.log").exists())
    assert "another sweeps.run is at work there" in sweep.run(status=2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)

    other = sweep.run("seed=1", status=2)
    assert (
        other
        == "error: seed=1: runs/tiny holds a sweep made with 0; use another study_dir= or remove runs/tiny\n"
    )
    base = sweep.folder / "base.yaml"
    base.write_text(base.read_text().replace("max_steps: 10", "max_steps: 11"))
    assert "train.base: trainer.max_steps=11: runs/tiny holds a sweep made with 10" in sweep.run(status=2)


@pytest.mark.slow
def test_random_sampling_spends_its_budget_exactly_and_can_be_extended(sweep):
    options = ["train.space.optim={lr: {low: 1.0e-4, high: 1.0e-2, log: true}}", "train.sampler=random"]
    sweep.run("train.budget.trials=2", "workers=3", *options)
    assert states(sweep.study_dir) == [TrialState.COMPLETE] * 2
    sweep.run("train.budget.trials=4", "workers=2", *options)
    trials = study_of(sweep.study_dir).get_trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 4
    assert len({trial.params["optim.lr"] for trial in trials}) == 4

"""What kills leave behind is found, named and repaired; a second time there is nothing to do."""

import json
import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from optuna.trial import TrialState

from conf.load import parse, to_yaml
from conf.schema import TrainConfig
from conf.sweep_schema import SweepConfig
from lightning_modules.tracking import Tracker
from sweeps.planning.plans import plan_samples
from sweeps.reconcile import main, reconcile
from sweeps.reports.results import finished
from sweeps.stores.store import Store
from sweeps.stores.studies import enqueue, make_study
from sweeps.trials.claims import claim, fail, finish
from sweeps.trials.trial import run_trial
from tests.sweeps.directories import leave_training, leave_trial

METRIC = {"passkey/recent_exact_beyond": "maximize"}


@pytest.fixture
def config(tmp_path: Path, storage_uri: str | None) -> SweepConfig:
    base = tmp_path / "base.yaml"
    base.write_text(to_yaml(parse(TrainConfig, ["conf/train/smoke.yaml"])))
    space = {"optim": {"lr": {"low": 1e-4, "high": 1e-2, "log": True}}}
    train = {"train.base": str(base), "train.space": space, "train.sampler": "random"}
    settings = {"train.budget.trials": 4, "tracking.enabled": False, "storage.uri": storage_uri}
    config = parse(SweepConfig, [{"name": "t", "study_dir": str(tmp_path), **train, **settings}])
    (tmp_path / "sweep.yaml").write_text(to_yaml(config))
    return config


@pytest.fixture
def store(tmp_path: Path, config: SweepConfig) -> Store:
    return Store(tmp_path, config, create=True)


@pytest.fixture
def study(store: Store):
    return make(store)


def make(store: Store):
    study = make_study(store, "train", METRIC, stage="train", mlflow_run_id=None)
    enqueue(study, plan_samples(4, seeds=[0]))
    return study


def begin(store: Store, study, *, die: bool = True, work: bool = True):
    """Claim a trial and do its work; `die` before the result is recorded, as a killed worker would."""
    taken = claim(store, [study])
    assert taken is not None
    if work:
        leave_trial(taken.run_dir)
        outcome = run_trial(taken, stop=lambda: True)
        if not die:
            finish(taken, outcome.values, outcome.seconds, outcome.known)
    taken.lock.release()
    return taken


def states(study) -> list[TrialState]:
    return [trial.state for trial in study.get_trials()]


def assert_nothing_left(store: Store) -> None:
    assert reconcile(store) == []


def test_result_that_nobody_recorded_is_and_a_living_trial_is_left_alone(store, study):
    done = begin(store, study)
    assert done.trial.number == 0
    alive = claim(store, [study])
    assert alive is not None
    assert alive.trial.number == 0, "a dead worker's trial is taken over first"
    lines = reconcile(store)
    assert lines == [], "a trial that is being worked on is left alone"
    assert states(study) == [TrialState.RUNNING, *[TrialState.WAITING] * 3]
    alive.lock.release()
    assert reconcile(store) == ["train/trial-0000: had a result that nobody recorded; recorded 0.7"]
    assert states(study) == [TrialState.COMPLETE, *[TrialState.WAITING] * 3]
    assert study.get_trials()[0].value == 0.7
    assert_nothing_left(store)


def test_preempted_trial_waits_under_its_number_with_its_parameters(store, study):
    taken = begin(store, study, work=False)
    (taken.run_dir / "checkpoints").mkdir(parents=True)
    (taken.run_dir / "checkpoints" / "step=0000040.ckpt").touch()
    parameters = study.get_trials()[0].params
    (line,) = reconcile(store)
    assert line == "train/trial-0000: its worker is gone; it waits, to be continued from step 0000040"
    assert states(study) == [TrialState.WAITING] * 4
    assert_nothing_left(store)
    again = claim(store, [study])
    assert again is not None
    assert (again.trial.number, again.trial.params) == (0, parameters)
    again.lock.release()


def test_record_without_results_is_done_again_in_the_same_directory(store, study, tmp_path):
    taken = begin(store, study, die=False)
    shutil.rmtree(taken.run_dir / "evaluation")
    (line,) = reconcile(store)
    assert line == "train/trial-0000: its results are gone; it is done again as train/trial-0004"
    assert finished(tmp_path, study) == []
    assert study.get_trials()[4].user_attrs["retry_of"] == 0
    assert study.get_trials()[4].system_attrs["fixed_params"] == study.get_trials()[0].params
    assert (tmp_path / "train" / "trial-0004" / "result.json").exists(), "what was trained is kept"
    assert_nothing_left(store)


def test_damaged_result_is_set_aside(store, study):
    taken = begin(store, study)
    (taken.run_dir / "evaluation" / "result.json").write_text('{"status": "comp')
    lines = reconcile(store)
    assert lines[0].endswith("result.json cannot be read; set aside as result.json.damaged")
    assert states(study) == [TrialState.WAITING] * 4
    assert_nothing_left(store)


def test_forgotten_trials_take_their_work_back_under_new_numbers(store, study, tmp_path):
    """A study that is made anew (its journal lost): other trials come first, and find others' directories."""
    points = {}
    for _ in range(2):
        taken = begin(store, study, die=False)
        points[study.get_trials()[taken.trial.number].user_attrs["plan"]] = taken.trial.params
    store.storage.delete_study(study._study_id)
    anew = make_study(store, "train", METRIC, stage="train", mlflow_run_id=None)
    plan = plan_samples(4, seeds=[0])
    enqueue(anew, {key: plan[key] for key in reversed(plan)})
    lines = reconcile(store)
    assert "train/trial-0000: has the work of train/trial-0003; moved there" in lines
    assert "train/trial-0001: has the work of train/trial-0002; moved there" in lines
    assert states(anew) == [TrialState.WAITING] * 2 + [TrialState.COMPLETE] * 2
    assert {t.user_attrs["plan"]: t.params for t in anew.get_trials()[2:]} == points
    assert_nothing_left(store)


def test_results_of_no_trial_become_one_and_strangers_are_set_aside(store, study, tmp_path):
    taken = begin(store, study)
    folder = tmp_path / "train"
    identity = json.loads((taken.run_dir / "trial.json").read_text())
    shutil.copytree(taken.run_dir, folder / "trial-0009")
    unknown = identity | {"plan": "sample-8", "planned": {"plan": "sample-8", "seed": 0}}
    (folder / "trial-0009" / "trial.json").write_text(json.dumps(unknown))
    leave_training(folder / "trial-0020")
    (folder / "trial-0021").mkdir()
    lines = reconcile(store)
    assert "train/trial-0009: has the work of train/trial-0004; moved there" in lines
    assert "train/trial-0020: says nothing of its trial; moved to orphans/train-trial-0020" in lines
    assert "train/trial-0021: an empty directory of no trial; removed" in lines
    assert states(study)[4] == TrialState.COMPLETE
    assert_nothing_left(store)


@pytest.mark.parametrize("storage_uri", [None], ids=["journal"])
def test_mlflow_runs_agree_with_their_trials(store, study, config, tmp_path, monkeypatch, capsys):
    config.tracking.enabled = True
    config.tracking.uri = f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "sweep.yaml").write_text(to_yaml(config))
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    runs = {}
    for name in ("done", "preempted", "failed"):
        taken = claim(store, [study])
        assert taken is not None
        tracker = Tracker(config.tracking, taken.run_dir, name=name, tags={"sweep": "t", "trial": "?"})
        taken.run_dir.mkdir(parents=True)
        tracker.__enter__()  # and killed: nobody ends it
        runs[name] = tracker.run_id
        if name == "failed":
            fail(taken, "why")
        if name == "done":
            leave_trial(taken.run_dir)
            outcome = run_trial(taken, stop=lambda: True)
            finish(taken, outcome.values, outcome.seconds, outcome.known)
            taken.lock.release()
        elif name == "failed":
            taken.lock.release()
        else:
            held = taken
    held.lock.release()
    assert main([f"study={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    client = MlflowClient(tracking_uri=config.tracking.uri)
    found = {name: client.get_run(run_id) for name, run_id in runs.items()}
    assert {name: run.info.status for name, run in found.items()} == {
        "done": "FINISHED",
        "preempted": "KILLED",
        "failed": "FAILED",
    }
    assert f"MLflow run {runs['done']} (train/trial-0000): was RUNNING; set to FINISHED" in printed
    assert found["preempted"].data.tags["trial"] == "train/trial-0001"
    assert found["preempted"].data.tags["slurm_chain"] == "4711:1"
    assert study.get_trials()[0].user_attrs["mlflow_run_id"] == runs["done"]
    assert json.loads((tmp_path / "train/trial-0000/trial.json").read_text())["mlflow_run_id"] == runs["done"]
    assert main([f"study={tmp_path}"]) == 0
    assert capsys.readouterr().out == "Nothing to repair.\n"

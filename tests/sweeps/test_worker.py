"""A worker that finds a run directory still written by another fails nothing, and can outlive a pause."""

import os
import signal
import threading
import time
import zipfile

import pytest
from optuna.trial import TrialState

from conf.load import parse, to_yaml
from conf.schema import TrainConfig
from conf.sweep_schema import SweepConfig, WorkerConfig
from lightning_modules.run_dir import open_run_dir
from sweeps.planning.plans import plan_given
from sweeps.stores.store import Store
from sweeps.stores.studies import enqueue, make_study
from sweeps.trials.claims import claim
from sweeps.trials.steps import Interrupted, Steps, set_aside_damaged
from sweeps.trials.trial import run_trial
from sweeps.worker import main, run_one, work
from tests.sweeps.directories import leave_training


def make(tmp_path) -> Store:
    base = to_yaml(parse(TrainConfig, ["conf/train/smoke.yaml"]))
    settings = {"study_dir": str(tmp_path), "train.base": str(tmp_path / "base.yaml")}
    config = parse(SweepConfig, [{"name": "t", "tracking.enabled": False, **settings}])
    (tmp_path / "base.yaml").write_text(base)
    (tmp_path / "sweep.yaml").write_text(to_yaml(config))
    return Store(tmp_path, config)


def test_a_directory_that_another_process_writes_lets_the_trial_wait(tmp_path, monkeypatch):
    """As when a host that was cut off still trains what this one has taken over."""
    monkeypatch.setattr("sweeps.worker.BUSY_SECONDS", 0.0)
    store = make(tmp_path)
    study = make_study(store, "train", {"loss": "maximize"}, stage="train", mlflow_run_id=None)
    enqueue(study, plan_given([{}], [0]))
    taken = claim(store, [study])
    assert taken is not None
    other = open_run_dir(taken.run_dir, parse(TrainConfig, [str(tmp_path / "base.yaml")]))
    run_one(taken, [])
    assert study.get_trials()[0].state == TrialState.WAITING
    assert "is writing it" in (taken.run_dir / "log.txt").read_text()
    other.close()
    again = claim(store, [study])
    assert again is not None
    assert again.trial.number == 0
    again.lock.release()


def test_waiting_worker_takes_what_a_later_stage_queues(tmp_path):
    store = make(tmp_path)
    make_study(store, "train", {"loss": "maximize"}, stage="train", mlflow_run_id=None)
    assert work(parse(WorkerConfig, [{"study": str(tmp_path)}]), []) == 0, "without wait it ends at once"
    stopping: list[int] = []
    waiting = parse(WorkerConfig, [{"study": str(tmp_path), "wait": 30.0}])
    worker = threading.Thread(target=work, args=(waiting, stopping))
    worker.start()
    time.sleep(0.2)
    later = make_study(
        store, "confirm-0000", {"loss": "maximize"}, stage="confirm", model="gone", mlflow_run_id=None
    )
    enqueue(later, plan_given([{"mitigation.name": "none"}], [None]))
    deadline = time.monotonic() + 60
    while later.get_trials()[0].state != TrialState.FAIL:  # there is no such model: it was tried
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stopping.append(15)
    worker.join()


def test_a_trial_that_heard_of_the_end_first_waits_and_one_asked_by_hand_goes_on(tmp_path, monkeypatch):
    statuses, stops = iter([143, 143, 0]), iter([False, True, True])
    monkeypatch.setattr(Steps, "_spawn", lambda *_: next(statuses))
    (tmp_path / "log.txt").touch()
    told = Steps(threads=1, stop=lambda: next(stops), watch=lambda: None)
    with pytest.raises(Interrupted):
        told.run("train", tmp_path, WorkerConfig(study="x"), [], {})
    by_hand = Steps(threads=1, stop=lambda: False, watch=lambda: None)
    monkeypatch.setattr(
        "sweeps.trials.steps.ended", lambda _: None if next(ends) else {"status": "completed"}
    )
    ends = iter([True, False])
    statuses = iter([143, 0])
    assert by_hand.run("train", tmp_path, WorkerConfig(study="x"), [], {})["status"] == "completed"
    assert next(statuses, None) is None, "it was started again"


def test_a_full_disk_fails_no_trial_and_ends_the_worker_with_one_line(tmp_path, monkeypatch, capsys):
    store = make(tmp_path)
    study = make_study(store, "train", {"loss": "maximize"}, stage="train", mlflow_run_id=None)
    enqueue(study, plan_given([{}], [0]))

    def spawn(steps, line, log, environment, checkpoint) -> int:
        log.write_text("error: step=0000010.ckpt: cannot be written (No space left on device)\n")
        return 1

    monkeypatch.setattr(Steps, "_spawn", spawn)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the tests' own handlers stay
    assert main([f"study={tmp_path}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("cannot be written (No space left on device)")
    assert study.get_trials()[0].state == TrialState.WAITING


def test_damaged_checkpoints_are_set_aside_and_a_lost_model_is_trained_again(tmp_path):
    store = make(tmp_path)
    study = make_study(store, "train", {"loss": "maximize"}, stage="train", mlflow_run_id=None)
    enqueue(study, plan_given([{}], [0]))
    taken = claim(store, [study])
    assert taken is not None
    leave_training(taken.run_dir, checkpoint="checkpoints/step=0000020.ckpt")
    (taken.run_dir / "checkpoints").mkdir()
    for step in (10, 20):
        with zipfile.ZipFile(taken.run_dir / "checkpoints" / f"step={step:07d}.ckpt", "w") as archive:
            archive.writestr("data", "x" * 100)
    newest = taken.run_dir / "checkpoints" / "step=0000020.ckpt"
    os.truncate(newest, newest.stat().st_size - 1)
    with pytest.raises(Interrupted):
        run_trial(taken, stop=lambda: True)
    assert not (taken.run_dir / "result.json").exists(), "nothing would evaluate an older model in its name"
    set_aside_damaged(newest.parent)  # as before every start
    assert sorted(path.name for path in newest.parent.iterdir()) == [
        "step=0000010.ckpt",
        "step=0000020.ckpt.damaged",
    ]
    taken.lock.release()

"""Claims under fire: many processes on one journal take every planned trial once, whoever dies."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState

from conf.load import parse
from conf.sweep_schema import SweepConfig
from sweeps.planning.plans import plan_given, plan_mitigations, plan_points, plan_samples
from sweeps.planning.samplers import point_of
from sweeps.stores.locks import ProcessLock
from sweeps.stores.store import Store
from sweeps.stores.studies import enqueue, last_failures, make_study, retry_failed
from sweeps.trials.claims import claim, fail, finish, to_take

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def config(tmp_path: Path, storage_uri: str | None) -> SweepConfig:
    (tmp_path / "base.yaml").write_text("{}")
    space = {"optim": {"lr": {"low": 1e-4, "high": 1e-2, "log": True}, "warmup_steps": [1, 2]}}
    train = {"train.base": str(tmp_path / "base.yaml"), "train.space": space, "train.budget.trials": 12}
    store = {"storage.uri": storage_uri}
    return parse(SweepConfig, [{"name": "t", "train.sampler": "tpe", **train, **store}])


@pytest.fixture
def store(tmp_path: Path, config: SweepConfig) -> Store:
    return Store(tmp_path, config, create=True)


def make_train_study(store: Store, plan):
    study = make_study(store, "train", {"loss": "maximize"}, stage="train", mlflow_run_id=None)
    enqueue(study, plan)
    return study


def work(study_dir: Path, config: SweepConfig) -> None:
    store = Store(study_dir, config)
    studies = store.load_studies()
    while taken := claim(store, studies):
        finish(taken, {"loss": taken.trial.params["optim.lr"]}, seconds=1.0)
        taken.lock.release()


def claim_and_hang(study_dir: Path, config: SweepConfig, claimed) -> None:
    store = Store(study_dir, config)
    assert claim(store, store.load_studies()) is not None
    claimed.set()
    time.sleep(60)


@pytest.mark.timeout(120)
def test_workers_that_start_at_once_share_the_trials_exactly(tmp_path, config, store):
    study = make_train_study(store, plan_samples(12, seeds=[0, 1]))
    workers = [SPAWN.Process(target=work, args=(tmp_path, config)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    trials = study.get_trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 12
    assert len({trial.params["optim.lr"] for trial in trials}) == 12  # no two workers proposed the same
    assert [trial.user_attrs["seed"] for trial in trials] == [0, 1] * 6


@pytest.mark.timeout(60)
def test_trial_of_a_killed_worker_is_taken_over_with_its_parameters(tmp_path, config, store):
    study = make_train_study(store, plan_samples(1, seeds=[0]))
    claimed = SPAWN.Event()
    worker = SPAWN.Process(target=claim_and_hang, args=(tmp_path, config, claimed))
    worker.start()
    claimed.wait(30)
    assert claim(store, [study]) is None  # its worker lives
    assert to_take(store, [study]) == 0
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    before = study.get_trials()[0].params
    assert to_take(store, [study]) == 1
    taken = claim(store, [study])
    assert taken is not None
    assert taken.trial.number == 0
    assert taken.trial.params == before
    finish(taken, {"loss": 1.0}, 1.0)
    taken.lock.release()
    assert claim(store, [study]) is None


def test_plan_is_queued_once_and_extended_by_what_it_lacks(store, config):
    config.train.space = {"model.d_state": [16, 64]}
    points = [{"model.d_state": n} for n in (16, 64)]
    study = make_train_study(store, plan_points(points, seeds=[0]))
    assert enqueue(study, plan_points(points, seeds=[0])) == 0
    enqueue(study, plan_points(points, seeds=[0, 1]))
    trials = study.get_trials()
    planned = [(point_of(trial)["model.d_state"], trial.user_attrs["seed"]) for trial in trials]
    assert planned == [(16, 0), (64, 0), (16, 1), (64, 1)]


def test_failures_in_a_row_are_counted_over_all_workers_since_a_time(store):
    study = make_train_study(store, plan_samples(4, seeds=[0]))
    began = time.time()

    def end(ok: bool) -> None:
        taken = claim(store, [study])
        assert taken is not None
        finish(taken, {"loss": 1.0}, 1.0) if ok else fail(taken, "why")
        taken.lock.release()

    end(ok=False)
    end(ok=True)
    assert last_failures([study], began) == 0
    end(ok=False)
    assert last_failures([study], began) == 1
    between = time.time()
    end(ok=False)
    assert last_failures([study], began) == 2
    assert last_failures([study], between) == 1
    assert enqueue(study, plan_samples(4, seeds=[0])) == 0
    assert retry_failed(study) == 3
    assert [trial.user_attrs["retry_of"] for trial in study.get_trials()[4:]] == [0, 2, 3]


def test_mitigations_take_turns_and_share_names_of_settings_but_no_values(tmp_path):
    """`every` of two mitigations: a list of its own each; what was chosen comes back by its config name."""
    space = {
        "state_norm": {"max_norm": {"low": 1.0, "high": 9.0}, "every": [16, 64]},
        "hard_reset": {"every": [128, 256]},
        "sliding_window": {"window": {"low": 8, "high": 64, "log": True}},
    }
    settings = {"mitigation.space": space, "mitigation.sampler": "tpe", "mitigation.budget.trials": 5}
    config = parse(SweepConfig, [{"name": "t", **settings}])
    store = Store(tmp_path, config)
    study = make_study(store, "mitigation-0000", {"loss": "maximize"}, stage="mitigation", model="m")
    enqueue(study, plan_given([{"mitigation.name": "none"}], [None]) | plan_mitigations(space, 5))
    failed = 0
    while taken := claim(store, [study]):
        point = point_of(taken.trial)
        if "mitigation.window" in point and not failed:
            failed = taken.trial.number
            fail(taken, "why")
        else:
            finish(taken, {"loss": float(point.get("mitigation.every", 0))}, seconds=1.0)
        taken.lock.release()
    points = [point_of(trial) for trial in study.get_trials()]
    assert [point["mitigation.name"] for point in points] == ["none", *[*space] * 5]
    for point in points[1:]:
        name = point.pop("mitigation.name")
        assert set(point) == {f"mitigation.{setting}" for setting in space[name]}
        for setting, values in space[name].items():
            value = point[f"mitigation.{setting}"]
            assert value in values if isinstance(values, list) else values["low"] <= value <= values["high"]
    windows = [point["mitigation.window"] for point in points if "mitigation.window" in point]
    assert all(isinstance(window, int) for window in windows)
    assert len(set(windows)) > 2
    assert retry_failed(study) == 1
    again = claim(store, [study])
    assert again is not None
    assert point_of(again.trial) == point_of(study.get_trials()[failed])
    again.lock.release()


def test_lock_excludes_another_holder_until_released(tmp_path):
    first, second = ProcessLock(tmp_path / "lock"), ProcessLock(tmp_path / "lock")
    assert first.try_acquire()
    assert not second.try_acquire()
    first.release()
    assert second.try_acquire()
    second.release()

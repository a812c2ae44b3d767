"""A real PostgreSQL that is killed, restarted and hung up on: trials are neither lost nor run by two."""

import multiprocessing
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from optuna.trial import TrialState

from conf.load import parse
from conf.sweep_schema import SweepConfig
from sweeps.endings import DatabaseGone
from sweeps.planning.plans import plan_samples
from sweeps.stores.store import Store
from sweeps.stores.studies import enqueue, make_study
from sweeps.trials.claims import LostTrial, claim, finish, to_take

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def config(tmp_path: Path, postgres: str) -> SweepConfig:
    (tmp_path / "base.yaml").write_text("{}")
    space = {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    train = {"train.base": str(tmp_path / "base.yaml"), "train.space": space, "train.sampler": "random"}
    train["train.budget.trials"] = 30
    return parse(SweepConfig, [{"name": "t", "storage.uri": postgres, "storage.patience": 60.0, **train}])


def make(store: Store, count: int):
    study = make_study(store, "train", {"loss": "maximize"}, stage="train", mlflow_run_id=None)
    enqueue(study, plan_samples(count, seeds=[0]))
    return study


def work(study_dir: Path, config: SweepConfig) -> None:
    store = Store(study_dir, config)
    studies = store.load_studies()
    while taken := claim(store, studies):
        with (study_dir / f"ran-{taken.trial.number}").open("a") as ran:
            ran.write("x")
        time.sleep(0.05)
        finish(taken, {"loss": taken.trial.params["optim.lr"]}, seconds=0.1)
        taken.lock.release()


@pytest.mark.timeout(180)
def test_killed_and_restarted_server_costs_no_trial_and_none_runs_twice(tmp_path, config, postgres_server):
    store = Store(tmp_path, config, create=True)
    study = make(store, 20)
    workers = [SPAWN.Process(target=work, args=(tmp_path, config), daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
    for fault in ("kill", "disconnect", "kill"):
        wanted = len(list(tmp_path.glob("ran-*"))) + 4
        while len(list(tmp_path.glob("ran-*"))) < wanted:
            time.sleep(0.02)
        if fault == "kill":
            postgres_server.kill()
            time.sleep(0.5)
            postgres_server.start()
        else:
            assert postgres_server.disconnect_all() >= 2
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 2
    trials = study.get_trials()
    # One claim may have been recorded without an answer: nobody holds it, so the next worker has it.
    assert to_take(store, [study]) == sum(not trial.state.is_finished() for trial in trials)
    work(tmp_path, config)
    assert [trial.state for trial in study.get_trials()] == [TrialState.COMPLETE] * 20
    assert {path.name: path.read_text() for path in tmp_path.glob("ran-*")} == {
        f"ran-{number}": "x" for number in range(20)
    }


def test_lost_session_keeps_its_trial_unless_another_host_has_taken_it(tmp_path, config, postgres_server):
    store = Store(tmp_path, config, create=True)
    study = make(store, 2)
    kept, lost = claim(store, [study]), claim(store, [study])
    assert kept is not None
    assert lost is not None
    postgres_server.disconnect_all()
    # Another host, whose file system knows nothing of our locks.
    (tmp_path / "locks" / f"train-{lost.trial.number:04d}.lock").unlink()
    other = Store(tmp_path, config)
    taken = claim(other, other.load_studies())
    assert taken is not None
    assert taken.trial.number == lost.trial.number
    with pytest.raises(LostTrial, match=r"train/trial-0001: another worker has taken it over"):
        lost.beat(0.0)
    with pytest.raises(LostTrial):
        finish(lost, {"loss": 0.0}, 1.0)
    kept.beat(0.0)
    finish(kept, {"loss": 1.0}, 1.0)
    finish(taken, {"loss": 2.0}, 1.0)
    assert [trial.value for trial in study.get_trials()] == [1.0, 2.0]


def test_absent_server_is_waited_for_as_long_as_patience_says(tmp_path, config, postgres_server, capsys):
    config.storage.patience = 1.0
    store = Store(tmp_path, config, create=True)
    study = make(store, 1)
    postgres_server.kill()
    try:
        with pytest.raises(DatabaseGone, match=r"has not answered for \d+ s"):
            study.get_trials()
    finally:
        postgres_server.start()
    assert "does not answer" in capsys.readouterr().err
    assert len(study.get_trials()) == 1


def test_a_worker_that_starts_while_the_server_is_away_waits(tmp_path, config, postgres_server):
    make(Store(tmp_path, config, create=True), 1)
    postgres_server.kill()
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(lambda: Store(tmp_path, config, wait=True).load_studies())
        try:
            with pytest.raises(ValueError, match="start the server or mend the URL"):
                Store(tmp_path, config)
            assert not opened.done()
        finally:
            postgres_server.start()
        assert [len(study.get_trials()) for study in opened.result(60)] == [1]


def test_mistakes_are_one_line(tmp_path, config, postgres):
    make(Store(tmp_path, config, create=True), 1)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ValueError, match=rf"holds a sweep of this name, made in {tmp_path}; use another"):
        make(Store(tmp_path / "elsewhere", config), 1)
    config.storage.uri = "postgresql://me:secret@127.0.0.1:1/nowhere"
    with pytest.raises(
        ValueError, match=r"^storage.uri=postgresql://me@127.0.0.1:1/nowhere: [^\n]*$"
    ) as error:
        Store(tmp_path, config, create=True)
    assert "secret" not in str(error.value)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_sweep_survives_a_killed_server(sweep, postgres, postgres_server):
    sweep.start(f"storage.uri={postgres}", step_seconds=0.3)
    sweep.wait_until_training(trials=2)
    postgres_server.kill()
    time.sleep(1.0)
    postgres_server.start()
    sweep.finish()
    config = parse(SweepConfig, [str(sweep.study_dir / "sweep.yaml"), {"study_dir": str(sweep.study_dir)}])
    (study,) = Store(sweep.study_dir, config).load_studies()
    assert [trial.state for trial in study.get_trials()] == [TrialState.COMPLETE] * 3
    assert not (sweep.study_dir / "journal.log").exists()
    starts = sorted(len(f.read_text().splitlines()) for f in sweep.study_dir.glob("train/trial-*/starts"))
    assert starts == [1, 1, 1], "no training was stopped by the outage"
    again = [sys.executable, "-m", "sweeps.reconcile", f"study={sweep.study_dir}"]
    done = subprocess.run(again, capture_output=True, text=True, check=True)
    assert done.stdout == "Nothing to repair.\n"

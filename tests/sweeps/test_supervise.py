"""Workers that keep dying end a sweep only where nothing gets done in between."""

import subprocess

import pytest

from sweeps.planning.plans import plan_given
from sweeps.stores.studies import enqueue, make_study
from sweeps.supervise import SweepFailed, Workers
from sweeps.trials.claims import claim, finish
from tests.sweeps.test_worker import make


@pytest.mark.parametrize("gets_on", [True, False])
def test_dying_workers(tmp_path, monkeypatch, gets_on):
    store = make(tmp_path)
    store.config.workers = 1
    study = make_study(store, "train", {"loss": "maximize"}, stage="train", mlflow_run_id=None)
    enqueue(study, plan_given([{}], range(5)))
    workers = Workers(store, [], say=print)
    workers.log(0).parent.mkdir()
    workers.log(0).write_text("Segmentation fault\n")
    started = []

    def start(index: int) -> subprocess.Popen:
        """A worker that has done a trial, or none, when it dies."""
        started.append(index)
        taken = claim(store, [study]) if gets_on else None
        if taken is not None:
            finish(taken, {"loss": 0.0}, seconds=1.0)
            taken.lock.release()
        process = subprocess.Popen(["false"])
        process.wait()
        return process

    monkeypatch.setattr(workers, "_start", start)
    if gets_on:
        workers.run([study], watch=lambda: None, grow=lambda: 0)
        assert len(started) == 5
    else:
        with pytest.raises(SweepFailed, match="workers keep ending with status 1: Segmentation fault"):
            workers.run([study], watch=lambda: None, grow=lambda: 0)
        assert len(started) == 3

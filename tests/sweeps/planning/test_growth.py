"""A stage whose plan grows while it runs: a search that asks for more where its results say so."""

from types import SimpleNamespace

import pytest
from optuna.study import Study
from optuna.trial import TrialState

from conf.load import parse
from conf.sweep_schema import SweepConfig
from sweeps.conduct import Sweep
from sweeps.planning.plans import Plan, plan_given
from sweeps.planning.samplers import point_of
from sweeps.report import make_console
from sweeps.stores.studies import make_study
from sweeps.trials.claims import claim, fail, finish


@pytest.fixture
def sweep(tmp_path, monkeypatch) -> Sweep:
    (tmp_path / "base.yaml").write_text("{}")
    settings = {
        "name": "t",
        "train.base": str(tmp_path / "base.yaml"),
        "train.space": {"model.d_state": [16]},
    }
    config = parse(SweepConfig, [settings])
    sweep = Sweep(config, tmp_path, make_console(), [])

    def work_one_off(studies: list[Study]) -> None:
        """In place of starting processes: end one trial, failing for d_state 32."""
        taken = claim(sweep.store, studies)
        if taken:
            n = point_of(taken.trial)["model.d_state"]
            fail(taken, "why") if n == 32 else finish(taken, {"loss": 1.0 / n}, 1.0)
            taken.lock.release()

    monkeypatch.setattr("sweeps.conduct.mend_study", lambda *_: [])  # these trials leave no results
    monkeypatch.setattr(sweep.workers, "_start_missing", work_one_off)
    monkeypatch.setattr("sweeps.supervise.time", SimpleNamespace(sleep=lambda _: None, monotonic=lambda: 0))
    return sweep


def double(study: Study) -> Plan:
    """The next power of two above the largest state that has ended, to 128."""
    ended = [point_of(t)["model.d_state"] for t in study.get_trials() if t.state.is_finished()]
    return plan_given([{"model.d_state": 2 * n} for n in ended if n < 128], [0])


def test_stage_grows_from_its_results_and_ends_when_nothing_is_added(sweep):
    study = make_study(sweep.store, "train", {"loss": "maximize"}, stage="train")
    sweep._study("train", plan_given([{"model.d_state": 16}], [0]), {"loss": "maximize"}, stage="train")
    sweep._finish("train", study, grow=double)
    trials = study.get_trials()
    assert [point_of(trial)["model.d_state"] for trial in trials] == [16, 32, 64, 128]
    assert [trial.state == TrialState.COMPLETE for trial in trials] == [True, False, True, True]
    sweep._finish("train", study, grow=double)
    assert len(study.get_trials()) == 4, "the same plan again adds nothing, and retries no failure"


def test_next_start_retries_what_failed_of_a_grown_plan(sweep):
    sweep._study("train", plan_given([{"model.d_state": 16}], [0]), {"loss": "maximize"}, stage="train")
    study = make_study(sweep.store, "train", {"loss": "maximize"}, stage="train")
    sweep._finish("train", study, grow=double)
    sweep._study("train", plan_given([{"model.d_state": 16}], [0]), {"loss": "maximize"}, stage="train")
    retried = study.get_trials()[4:]
    assert [(trial.user_attrs["retry_of"], point_of(trial)) for trial in retried] == [
        (1, {"model.d_state": 32})
    ]

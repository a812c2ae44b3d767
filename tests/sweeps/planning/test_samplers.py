"""What samplers propose lies in the space, holds to its conditions, and does not depend on who asks."""

import pytest
from optuna.trial import TrialState

from conf.load import parse
from conf.sweep_schema import SweepConfig
from sweeps.conduct import grow_training
from sweeps.planning.budget import is_open, is_spent, not_started
from sweeps.planning.plans import plan_training
from sweeps.planning.samplers import point_of, powers_of
from sweeps.stores.store import Store
from sweeps.stores.studies import enqueue, make_study
from sweeps.trials.claims import claim, finish, to_take

SPACE = {
    "model.d_state": {"low": 16, "high": 256, "power_of_two": True},
    "optim.lr": {"low": 1e-4, "high": 1e-2, "log": True},
    "optim.warmup_steps": {"low": 1, "high": 9},
    "initial_state.name": ["zero", "noise"],
}
CONDITIONAL = {"initial_state.std": {"low": 0.5, "high": 1.0, "when": {"initial_state.name": "noise"}}}


def make(tmp_path, sampler: str, trials: int | None, space=SPACE, **settings) -> SweepConfig:
    (tmp_path / "base.yaml").write_text("{}")
    train = {"space": space, "sampler": sampler, "budget.trials": trials, **settings}
    named = {f"train.{name}": value for name, value in train.items()}
    return parse(SweepConfig, [{"name": "t", "train.base": str(tmp_path / "base.yaml"), **named}])


def start(tmp_path, config: SweepConfig, directions=None):
    store = Store(tmp_path, config)
    directions = directions or {"loss": "minimize"}
    study = make_study(store, "train", directions, stage="train", powers=powers_of(config, "train"))
    enqueue(study, plan_training(config, config.train.budget.trials or 0))
    return store, study


def run(store, study, count: int = 1000, grow: bool = False, **attributes) -> None:
    while count and (taken := claim(store, [study])):
        for name, value in attributes.items():
            taken.trial.set_user_attr(name, value)
        value = point_of(taken.trial)["optim.lr"]
        finish(taken, dict.fromkeys(study.user_attrs["objectives"], value), 1.0, {}, {"b": value - 5e-3})
        taken.lock.release()
        if grow:
            enqueue(study, grow_training(store.config, study))
        count -= 1


@pytest.mark.parametrize("sampler", ["random", "qmc", "tpe", "gp"])
def test_points_lie_in_the_space_and_baselines_come_first(tmp_path, sampler):
    space = SPACE if sampler in ("qmc", "gp") else SPACE | CONDITIONAL
    baseline = {"model.d_state": 64, "optim.lr": 2e-3}
    config = make(tmp_path, sampler, 8, space, baselines=[baseline])
    store, study = start(tmp_path, config)
    run(store, study)
    points = [point_of(trial) for trial in study.get_trials()]
    assert len(points) == 8
    assert points[0] | baseline == points[0]
    for point in points:
        assert point["model.d_state"] in (16, 32, 64, 128, 256)
        assert 1e-4 <= point["optim.lr"] <= 1e-2
        assert isinstance(point["optim.warmup_steps"], int)
        held = point["initial_state.name"] == "noise" and sampler not in ("qmc", "gp")
        assert ("initial_state.std" in point) == held
    assert len({point["optim.lr"] for point in points}) >= (4 if sampler == "gp" else 8)
    assert [t.constraints["b"] > 0 for t in study.get_trials()] == [p["optim.lr"] > 5e-3 for p in points]


@pytest.mark.parametrize("sampler", ["random", "qmc"])
def test_random_and_qmc_points_are_the_same_whoever_runs_them_and_however_many(tmp_path, sampler):
    found = []
    for folder, trials, restarts in (("a", 5, 5), ("b", 8, 1)):
        (tmp_path / folder).mkdir()
        config = make(tmp_path / folder, sampler, trials)
        _, study = start(tmp_path / folder, config)
        for _ in range(restarts):
            run(Store(tmp_path / folder, config), study, count=8 // restarts)
        found.append([point_of(trial) for trial in study.get_trials()][:5])
    assert found[0] == found[1]


def test_several_objectives_are_told(tmp_path):
    config = make(tmp_path, "tpe", 3, objectives={"loss": "minimize", "memory": "minimize"})
    store, study = start(tmp_path, config, config.train.objectives)
    run(store, study)
    assert [len(trial.values) for trial in study.get_trials()] == [2, 2, 2]


def test_budget_of_tokens_holds_over_workers_and_starts_and_begun_trials_are_finished(tmp_path):
    config = make(tmp_path, "random", None, **{"budget.tokens": 1000.0})
    store, study = start(tmp_path, config)
    assert enqueue(study, grow_training(config, study)) == config.workers
    run(store, study, count=2, grow=True, tokens=300.0)
    held = claim(store, [study])
    assert held is not None
    held.trial.set_user_attr("tokens", 300.0)  # what it will take counts from its beginning
    enqueue(study, grow_training(config, study))
    assert not is_spent(study, config)
    run(Store(tmp_path, config), study, grow=True, tokens=300.0)
    assert is_spent(study, config)
    assert claim(store, [study]) is None
    assert grow_training(config, study) == {}
    assert is_open(study, config), "one still runs"
    held.lock.release()  # its worker dies: it has begun, and is finished all the same
    assert to_take(store, [study]) == 1
    run(store, study, grow=True)
    states = [trial.state for trial in study.get_trials()]
    assert states.count(TrialState.COMPLETE) == 4
    assert not_started(study, config) == states.count(TrialState.WAITING) > 0
    assert not is_open(study, config)
    config.train.budget.tokens = 1500.0
    assert is_open(study, config)


def test_budget_of_hours_counts_all_work(tmp_path):
    config = make(tmp_path, "random", 5, **{"budget.hours": 1.0})
    store, study = start(tmp_path, config)
    run(store, study, count=2, worked=1700.0)
    assert not is_spent(study, config)
    run(store, study, count=1, worked=1700.0)
    assert is_spent(study, config)
    assert claim(store, [study]) is None


def test_every_point_runs_with_each_seed_within_the_exact_budget(tmp_path):
    config = make(tmp_path, "tpe", 6, every_seed=True, seeds=[3, 4])
    store, study = start(tmp_path, config)
    assert len(study.get_trials()) == 3
    run(store, study, grow=True)
    found = [(point_of(trial)["optim.lr"], trial.user_attrs["seed"]) for trial in study.get_trials()]
    rates = {rate for rate, _ in found}
    assert sorted(found) == sorted((rate, seed) for rate in rates for seed in (3, 4))
    assert len(rates) == 3

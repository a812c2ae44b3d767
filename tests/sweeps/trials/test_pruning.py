"""Trials that fall behind at equal tokens end early; those that cannot be compared are left alone."""

import json

import pytest
from optuna.trial import TrialState

from conf.load import parse
from conf.schema import TrainConfig
from conf.sweep_schema import SweepConfig
from conf.sweep_stages import TrainStageConfig
from sweeps.planning.plans import plan_points
from sweeps.stores.store import Store
from sweeps.stores.studies import enqueue, load_studies, make_study
from sweeps.trials.claims import claim, finish
from sweeps.trials.pruning import GROUP, Follower, group_of, make_pruner


@pytest.fixture
def store(tmp_path) -> Store:
    (tmp_path / "base.yaml").write_text("{}")
    space = {"model.d_state": list(range(16, 16 + 12))}
    settings = {"train.base": str(tmp_path / "base.yaml"), "train.space": space}
    return Store(tmp_path, parse(SweepConfig, [{"name": "t", **settings}]))


def start(store: Store, direction: str = "minimize"):
    study = make_study(store, "train", {"loss": direction}, stage="train")
    enqueue(study, plan_points([{"model.d_state": n} for n in range(16, 16 + 12)], [0]))
    return study


def follow(store: Store, study, losses, stage, config) -> int | None:
    """Run a trial whose validation losses these are; returns the step at which it is told to end."""
    taken = claim(store, [study])
    assert taken is not None
    taken.run_dir.mkdir(parents=True)
    taken.trial.set_user_attr(GROUP, group_of(config))
    follower = Follower(taken, stage, config)
    for i, loss in enumerate(losses):
        with (taken.run_dir / "metrics.jsonl").open("a") as file:
            step = 10 * (i + 1)
            file.write(json.dumps({"step": step, "metrics": {"val/loss": loss}}) + "\n")
        follower.poll()
        verdict = json.loads((taken.run_dir / "verdict.json").read_text())
        assert verdict["step"] == step
        if verdict["prune"]:
            taken.study.tell(taken.trial, state=TrialState.PRUNED)
            taken.lock.release()
            return step
    finish(taken, {"loss": losses[-1]}, 1.0)
    taken.lock.release()
    return None


def stage_of(name: str, **settings) -> TrainStageConfig:
    pruner = {f"train.pruner.{key}": value for key, value in {"name": name, **settings}.items()}
    return parse(SweepConfig, [{"name": "t", "train.direction": "minimize", **pruner}]).train


def config_of(**settings) -> TrainConfig:
    sized = {"data.train_length": 128, "data.batch_size": 2, "trainer.max_steps": 40}
    return parse(TrainConfig, [sized | settings])


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_median_compares_at_equal_tokens_within_the_group_alone(store, direction):
    study = start(store, direction)
    stage = stage_of("median", startup_trials=2, min_tokens=10 * 256 + 1)
    stage.direction = direction  # of the objective; the pruner's own metric is a loss either way
    config, longer = config_of(), config_of(**{"data.train_length": 256})
    assert follow(store, study, [4, 3, 2, 1], stage, config) is None
    assert follow(store, study, [4, 3, 2, 1], stage, config) is None
    assert follow(store, study, [9, 9, 9, 9], stage, longer) is None, "other lengths are no comparison"
    assert follow(store, study, [9, 9, 9, 9], stage, config) == 20, "not before min_tokens"
    assert follow(store, study, [4, 3, 1, 1], stage, config) is None
    values = study.get_trials()[0].intermediate_values
    assert list(values) == [10 * 256, 20 * 256, 30 * 256, 40 * 256]


@pytest.mark.parametrize("name", ["halving", "hyperband"])
def test_rungs_promote_the_best_of_a_group(store, name):
    study = start(store)
    stage, config = stage_of(name, min_tokens=10 * 256, reduction_factor=2), config_of()
    ended = [follow(store, study, [n / 10, n / 20, n / 40, n / 80], stage, config) for n in range(1, 9)]
    assert ended[0] is None, "the best so far goes on"
    assert any(ended), "the worse end at a rung"
    assert {step for step in ended if step} <= {10, 20, 40}
    other = config_of(**{"data.train_length": 256})
    assert follow(store, study, [9.0, 9.0, 9.0, 9.0], stage, other) is None, "first of its group"
    assert make_pruner(stage.pruner, 40 * 256)


def test_points_of_an_earlier_start_are_not_reported_again(store):
    study = start(store)
    stage, config = stage_of("median"), config_of()
    taken = claim(store, [study])
    assert taken is not None
    taken.run_dir.mkdir(parents=True)
    lines = [json.dumps({"step": 10 * i, "metrics": {"val/loss": 1.0}}) + "\n" for i in (1, 2)]
    (taken.run_dir / "metrics.jsonl").write_text(lines[0])
    Follower(taken, stage, config).poll()
    (taken.run_dir / "metrics.jsonl").write_text("".join(lines) + '{"step": 30, "met')
    again = Follower(taken, stage, config)
    again.poll()
    assert list(study.get_trials()[0].intermediate_values) == [10 * 256, 20 * 256]
    assert json.loads(again.verdict.read_text()) == {"step": 20, "prune": False}
    taken.lock.release()


def test_sweep_prunes_what_falls_behind_and_goes_on(sweep):
    options = ["train.pruner={name: median, startup_trials: 1}", "workers=1"]
    output = sweep.run(*options, "train.overrides={trainer: {val_every: 5}}", "train.metric=val/loss")
    (study,) = load_studies(sweep.study_dir)
    states = [trial.state for trial in study.get_trials()]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE]  # states 16, 64, 4
    assert "Pruned: 1 training trials ended early" in output
    assert "train/trial-0001  pruned  d_state 64  after" in output
    result = json.loads((sweep.study_dir / "train/trial-0001/result.json").read_text())
    assert (result["status"], result["steps"]) == ("pruned", 5)
    assert not (sweep.study_dir / "train/trial-0001/evaluation").exists()
    assert study.get_trials()[1].user_attrs["tokens"] == 5 * 128 * 2

"""Spaces with conditions and powers of two, objectives, bounds and budgets: checked by name, one line each."""

import pytest

from conf.load import parse
from conf.objectives import Bound
from conf.sweep_schema import SweepConfig, check, train_points, train_space

SPACE = {
    "initial_state.name": ["zero", "noise"],
    "initial_state.std": {"values": [0.5, 1.0], "when": {"initial_state.name": "noise"}},
    "model.d_state": {"low": 16, "high": 64, "power_of_two": True},
}


def make(space, **settings) -> SweepConfig:
    train = {f"train.{name}": value for name, value in {"space": space, **settings}.items()}
    return parse(SweepConfig, [{"name": "t", "train.base": "conf/train/smoke.yaml", **train}])


def test_a_part_of_the_grid_appears_where_it_holds():
    space = {**SPACE, "model.d_state": [16]}
    points = [tuple(point.values()) for point in train_points(make(space))]
    assert points == [("zero", 16), ("noise", 0.5, 16), ("noise", 1.0, 16)]


def test_powers_of_two_make_a_grid_and_every_part_is_checked_where_it_holds():
    config = make(SPACE)
    check(config)
    assert len(train_points(config)) == 9
    assert {point["model.d_state"] for point in train_points(config)} == {16, 32, 64}
    assert train_space(config)["model.d_state"].exponents == (4, 6)
    broken = {
        **SPACE,
        "initial_state.std": {"low": -1.0, "high": 1.0, "when": {"initial_state.name": "noise"}},
    }
    with pytest.raises(ValueError, match=r"train.space: initial_state.std=-1.0: "):
        check(make(broken, sampler="tpe", **{"budget.trials": 4}))


@pytest.mark.parametrize(
    ("space", "settings", "message"),
    [
        (
            {"model.d_state": {"low": 12, "high": 64, "power_of_two": True}},
            {},
            "power_of_two needs powers of two as low and high, e.g. 16 and 256; no log",
        ),
        (
            {"initial_state.std": {"values": [1.0], "when": {"initial_state.name": "noise"}}},
            {},
            "train.space.initial_state.std.when.initial_state.name=noise: is not above it in the space",
        ),
        (
            {
                "initial_state.name": ["zero"],
                "initial_state.std": {"values": [1.0], "when": {"initial_state.name": "noise"}},
            },
            {},
            "when.initial_state.name=noise: is not among its values ['zero']",
        ),
        (
            SPACE,
            {"sampler": "qmc", "budget.trials": 4},
            "train.space=['initial_state.std']: sampler=qmc takes no conditional parts",
        ),
        (
            {"model.d_state": [16]},
            {"objectives": {"val/loss": "minimize"}},
            "one objective is train.metric, direction",
        ),
        (
            {"model.d_state": [16]},
            {"objectives": {"a": "minimize", "b": "maximize"}, "pruner.name": "median"},
            "train.pruner.name=median: needs one objective",
        ),
        (
            {"model.d_state": [16]},
            {"constraints": ["peak < 4"]},
            "write METRIC <= NUMBER or METRIC >= NUMBER",
        ),
        ({"model.d_state": [16]}, {"pruner.name": "halving"}, "say where the first rung of halving is"),
        ({"model.d_state": [16]}, {"every_seed": True}, "a grid runs every point with each seed anyway"),
        (
            {"model.d_state": [16]},
            {"sampler": "random", "every_seed": True, "seeds": [0, 1], "budget.trials": 3},
            "train.budget.trials=3: must be a multiple of the 2 seeds",
        ),
        (
            {"model.d_state": [16, 32]},
            {"sampler": "tpe", "budget.trials": 3, "baselines": [{"model.d_state": 8}]},
            "train.baselines.model.d_state=8: is not among [16, 32]",
        ),
        ({"model.d_state": [16]}, {"budget.hours": -1.0}, "train.budget.hours=-1.0: must be positive"),
    ],
)
def test_mistake_is_refused_by_name(space, settings, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        check(make(space, **settings))
    assert message in str(error.value)


def test_other_storages_are_refused():
    with pytest.raises(ValueError, match=r"storage.uri=mysql://x: give postgresql://"):
        parse(SweepConfig, [{"name": "t", "storage.uri": "mysql://x"}])


def test_bounds_say_by_how_much_they_are_broken():
    bound = Bound.parse("c", "peak_memory_mib <= 4000")
    assert (bound.excess(3000.0), bound.excess(4500.0)) == (-1000.0, 500.0)
    assert Bound.parse("c", "val/exact >= 0.9").excess(0.8) == pytest.approx(0.1)
    assert bound.excess(float("nan")) > 0

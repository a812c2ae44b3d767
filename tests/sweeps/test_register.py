"""Which model of a sweep is its best; registering it with the real commands is in test_smoke_sweep."""

from pathlib import Path
from typing import Any

import pytest

from conf.load import parse
from conf.sweep_schema import RegisterConfig, SweepConfig
from sweeps.register import choose
from sweeps.reports.results import Measured, Mended, Results, Share


def measured(number: int, value: float, held: float = 0.0, **further: Any) -> Measured:
    share = Share(exact=held, low=0.0, high=1.0)
    fields: dict[str, Any] = {"point": {"model.d_state": number}, "conclusion": {}} | further
    return Measured(
        number=number,
        run_dir=Path(f"trial-{number:04d}"),
        seed=None,
        value=value,
        seconds=1.0,
        metrics={},
        train_length=128,
        recent={256: share},
        recall={},
        **fields,
    )


@pytest.fixture
def config(tmp_path: Path) -> SweepConfig:
    (tmp_path / "base.yaml").write_text("model: {d_model: 32, n_layers: 1, d_state: 16, headdim: 16}\n")
    space = {"train.space": {"model.d_state": [16, 64]}}
    return parse(SweepConfig, [{"name": "tiny", "train.base": str(tmp_path / "base.yaml"), **space}])


def results(config: SweepConfig, models: list[Measured], mended: list[Mended] | None = None) -> Results:
    return Results(config=config, models=models, mended=mended or [], failed=[], open=0)


def args(**settings: Any) -> RegisterConfig:
    return RegisterConfig(study="runs/tiny", name="tiny", **settings)


def test_the_objective_decides_then_what_is_held_then_the_first(config: SweepConfig) -> None:
    models = [measured(0, 0.5), measured(1, 0.9, 0.2), measured(2, 0.9, 0.4), measured(3, 0.9, 0.4)]
    assert choose(results(config, models), args(), config).model.number == 2
    assert choose(results(config, models), args(trial=0), config).model.number == 0
    models.append(measured(4, 1.0, broken=["memory/peak_mib <= 1"]))
    assert choose(results(config, models), args(), config).model.number == 2, "a bound does not hold"
    config.train.direction = "minimize"
    chosen = choose(results(config, models), args(), config)
    assert (chosen.model.number, chosen.evaluation) == (0, Path("trial-0000/evaluation"))


def test_the_best_under_its_mitigation(config: SweepConfig) -> None:
    first, second = measured(0, 0.5), measured(1, 0.4)
    none = measured(0, 0.3, point={"mitigation.name": "none"})
    mending = {"mitigation.name": "forget_more", "mitigation.alpha_scale": 0.999}
    mended = [
        Mended(model=first, tried=[], compared=[none]),
        Mended(model=second, tried=[], compared=[none, measured(1, 0.8, point=mending)]),
    ]
    chosen = choose(results(config, [first, second], mended), args(stage="confirm"), config)
    assert (chosen.model.number, chosen.value) == (1, 0.8)
    assert chosen.mitigation == "forget_more alpha_scale 0.999"
    only = choose(results(config, [first, second], mended), args(stage="confirm", trial=0), config)
    assert (only.model.number, only.mitigation) == (0, "")


def test_nothing_to_register_is_one_line(config: SweepConfig) -> None:
    for models, settings, message in (
        ([], {}, "has no finished model to register"),
        ([measured(0, 0.5)], {"trial": 3}, "has no finished training trial 3"),
        ([measured(0, 0.5)], {"stage": "confirm"}, "no mitigation was compared"),
    ):
        with pytest.raises(ValueError, match=rf"\Astudy=runs/tiny: {message}[^\n]*\Z"):
            choose(results(config, models), args(**settings), config)


@pytest.mark.parametrize("name", ["it's", 'say "a"', "a/b", "50%"])
def test_a_name_that_a_filter_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"name=.*: must hold none of / : \. % and quotes"):
        RegisterConfig(study="runs/tiny", name=name)

"""A sweep's config is checked whole, by name, before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from conf.load import parse
from conf.sweep_schema import (
    SweepConfig,
    check,
    evaluation,
    mitigation_points,
    train_base,
    train_points,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "base.yaml").write_text("data: {train_length: 128}\n")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        f"""\
name: tiny
train:
  base: {tmp_path}/base.yaml
  overrides: {{trainer: {{max_steps: 5}}}}
  space: {{data.train_length: [128, 256], model.d_state: [16, 64]}}
evaluate: {{passkey.prompts: 3}}
mitigation:
  space:
    forget_more: {{alpha_scale: [1.0, 0.999], insert_scale: [1.0, 0.75]}}
    decay_scale: {{decay_scale: [1.0, 1.2]}}
"""
    )
    return [str(sweep)]


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_sweep_holds(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = parse(SweepConfig, [str(path)])
    check(config)
    assert config.name == path.stem


def test_points_are_the_whole_grid_without_the_identity(arguments):
    config = parse(SweepConfig, arguments)
    check(config)
    assert train_base(config).trainer.max_steps == 5
    assert [tuple(point.values()) for point in train_points(config)] == [
        (128, 16),
        (128, 64),
        (256, 16),
        (256, 64),
    ]
    assert [tuple(point.values()) for point in mitigation_points(config)] == [
        ("forget_more", 1.0, 0.75),
        ("forget_more", 0.999, 1.0),
        ("forget_more", 0.999, 0.75),
        ("decay_scale", 1.2),
    ]


def test_settings_without_a_neutral_value_are_points_too(arguments):
    config = parse(SweepConfig, [*arguments, "mitigation.space={sliding_window: {window: [1, 64]}}"])
    check(config)
    points = [tuple(point.values()) for point in mitigation_points(config)]
    assert points[-2:] == [("sliding_window", 1), ("sliding_window", 64)]
    with pytest.raises(ValueError, match=r"mitigation.max_norm=None: state_norm needs it"):
        check(parse(SweepConfig, [*arguments, "mitigation.space={state_norm: {every: [4]}}"]))


def test_each_stage_evaluates_on_prompts_of_its_own(arguments):
    config = parse(SweepConfig, [*arguments, "mitigation.confirm.passkey.prompts=9"])
    settings = [evaluation(config, stage=stage) for stage in ("train", "mitigation", "confirm")]
    assert len({stage["seed"] for stage in settings}) == 3
    assert [stage["split"] for stage in settings] == ["validation", "validation", "test"]
    assert [stage["passkey.prompts"] for stage in settings] == [3, 3, 9]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.space.model.d_stat=[1]",
            "train.space: model.d_stat is no setting; did you mean model.d_state?",
        ),
        (
            "train.space.model.d_state=[x]",
            "model.d_state: Value 'x' of type 'str' could not be converted to Integer",
        ),
        ("train.space.model.d_state=[0]", "train.space: model.d_state=0: must be at least 1"),
        ("train.space.model.headdim=[32,48]", "model.headdim=48: must divide expand * d_model = 256"),
        ("train.space.model.d_state=[16,16]", "train.space.model.d_state=[16, 16]: each value once"),
        ("train.space.model.d_state=[]", "train.space.model.d_state=[]: give at least one value"),
        ("train.space.model.d_state=8", "write a list of values or {low: ..., high: ..., log: true}"),
        ("train.space.model={d_state: {low: 1, high: 9}}", "a grid needs a list; a range needs sampler=tpe"),
        ("train.space.model={d_state: {low: 9, high: 1}}", "needs low < high"),
        ("train.space.seed=[1,2]", "list seeds under train.seeds"),
        ("train.seeds=[1,1]", "train.seeds=[1, 1]: give at least one seed, each once"),
        ("train.sampler=tpe", "train.trials=None: say how many trials sampler=tpe makes"),
        ("train.trials=3", "train.trials=3: a grid tries all its points"),
        ("train.base=nowhere.yaml", "train.base: nowhere.yaml: no such config file"),
        ("train.overrides.optim.lrr=1", "Key 'lrr' not in 'OptimConfig'. Did you mean: 'lr'?"),
        ("evaluate.passkey.promts=1", "Key 'promts' not in 'PasskeyEvalConfig'. Did you mean: 'prompts'?"),
        ("evaluate.mitigation.name=none", "evaluate=['mitigation.name']: belongs to the sweep"),
        ("mitigation.space.forget_mor.alpha_scale=[1]", "Invalid value 'forget_mor', expected one of"),
        (
            "mitigation.space.forget_more.delta_scale=[0.5]",
            "mitigation.delta_scale=0.5: belongs to delta_scale",
        ),
        ("mitigation.space.forget_more.alpha_scale=[1.5]", "mitigation.alpha_scale=1.5: must lie in (0, 1]"),
        ("name=a/b", "name=a/b: use letters, digits, - and _"),
        ("workers=-1", "workers=-1: must be at least 0"),
        ("trains.base=x", "Key 'trains' not in 'SweepConfig'. Did you mean one of: 'train',"),
    ],
)
def test_mistake_is_refused_by_name(arguments, override, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        check(parse(SweepConfig, [*arguments, override]))
    assert message in str(error.value)


def test_ranges_pass_with_a_sampler_and_are_checked_at_their_ends(arguments):
    options = [*arguments, "train.sampler=tpe", "train.trials=4"]
    check(parse(SweepConfig, [*options, "train.space.optim={lr: {low: 1.0e-4, high: 1, log: true}}"]))
    with pytest.raises(ValueError, match=r"optim\.decay_fraction=2\.0: must lie in \[0, 1\]"):
        check(parse(SweepConfig, [*options, "train.space.optim={decay_fraction: {low: 0.0, high: 2.0}}"]))


def test_mistake_answers_before_torch_optuna_and_mlflow_are_imported(arguments):
    program = """\
import sys
from sweeps.run import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert end.code == 2, end.code
assert not {"torch", "optuna", "mlflow", "matplotlib", "lightning"} & set(sys.modules), "imported too early"
"""
    command = [sys.executable, "-c", program, *arguments, "train.space.model.d_stat=[1]"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "error: train.space: model.d_stat is no setting; did you mean model.d_state?\n"


@pytest.mark.parametrize("module", ["sweeps.worker", "sweeps.report"])
def test_other_commands_name_a_wrong_study_directory(module, tmp_path):
    command = [sys.executable, "-m", module, f"study={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: study={tmp_path}: no sweep.yaml there; give the study_dir of a sweep\n"

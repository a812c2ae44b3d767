"""What the report says: three words kept apart, a price for each mitigation, the truth when none helps."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from conf.load import parse
from conf.sweep_schema import SweepConfig
from lightning_modules.evaluation.conclusion import conclude
from sweeps.report import ui_line
from sweeps.reports.figures import write_figures
from sweeps.reports.results import (
    Failed,
    Measured,
    Mended,
    Results,
    Share,
    best_settings,
    describe,
    table_rows,
    worst_collapse,
)
from sweeps.reports.tables import conclusion, render

NONE = {"mitigation.name": "none"}
FORGET = {"mitigation.name": "forget_more", "mitigation.alpha_scale": 0.999, "mitigation.insert_scale": 1.0}
SCALE = {"mitigation.name": "delta_scale", "mitigation.delta_scale": 0.9}


def measured(point, recent, *, number=0, recall=(), width=0.05, value=None) -> Measured:
    """A model trained at 64 tokens, with exact match `recent` (and `recall`) at 64, 256, 1024, 4096."""

    def shares(exact):
        lengths = (64, 256, 1024, 4096)
        return {
            n: Share(exact=e, low=max(0, e - width), high=min(1, e + width))
            for n, e in zip(lengths, exact, strict=False)
        }

    def rows(of):
        return [{"length": n, "exact": share.exact} for n, share in of.items()]

    near, far = shares(recent), shares(recall)
    beyond = [share.exact for n, share in near.items() if n >= 1024]
    passkey = {"recent": rows(near), "recall_by_length": rows(far)}
    return Measured(
        number=number,
        run_dir=Path(f"train/trial-{number:04d}"),
        point=point,
        seed=None,
        value=sum(beyond) / len(beyond) if value is None else value,
        seconds=60.0,
        metrics={"passkey/recent_exact_beyond": sum(beyond) / len(beyond)},
        train_length=64,
        recent=near,
        recall=far,
        conclusion=conclude(64, passkey, None),
    )


@pytest.fixture
def config() -> SweepConfig:
    return parse(SweepConfig, [{"name": "t", "mitigation.space": {"forget_more": {"alpha_scale": [0.999]}}}])


def results(config, models=(), mended=(), failed=(), unfinished=0) -> Results:
    return Results(
        config=config, models=list(models), mended=list(mended), failed=list(failed), open=unfinished
    )


def text(found: Results) -> str:
    output = io.StringIO()
    console = Console(width=160, file=output)
    for block in render(found):
        console.print(block)
    return output.getvalue()


def row_of(output: str, label: str) -> str:
    return next(line for line in output.splitlines() if label in line)


def test_unsolved_collapse_and_forgetting_are_named_apart(config):
    unsolved = measured({"model.d_state": 4}, [0.3, 0.1, 0.0, 0.0], number=0, recall=[0.3, 0.0])
    collapsing = measured({"model.d_state": 64}, [0.98, 0.8, 0.45, 0.2], number=1, recall=[0.97, 0.6])
    forgetting = measured({"model.d_state": 16}, [0.99, 0.95, 0.9, 0.9], number=2, recall=[0.98, 0.4])
    output = text(results(config, [unsolved, collapsing, forgetting]))
    assert "unsolved 0.30" in row_of(output, "d_state 4 ")
    assert "from" not in row_of(output, "d_state 4 ")
    assert row_of(output, "d_state 64").split("│")[3:5] == ["    from 1K ", " none to 256 "]
    assert row_of(output, "d_state 16").split("│")[3:5] == [" none to 4K ", "    from 256 "]


def test_models_to_mend_are_solved_ones_that_lose_most(config):
    unsolved = measured({}, [0.3, 0.0, 0.0, 0.0], number=0)
    worst = measured({}, [0.95, 0.5, 0.2, 0.1], number=1)
    better = measured({}, [0.95, 0.9, 0.8, 0.8], number=2)
    assert worst_collapse([unsolved, better, worst], config) == [worst]
    lost = measured({}, [0.95, 0.9, 0.0, 0.0], number=3)
    lost_sooner = measured({}, [0.95, 0.1, 0.0, 0.0], number=4)
    assert worst_collapse([lost, lost_sooner], config) == [lost_sooner]
    output = text(results(config, [unsolved]))
    assert "No mitigation was tried: no model solved its task" in output


def test_best_setting_is_the_best_among_those_that_cost_little(config):
    baseline = measured(NONE, [0.98, 0.5, 0.2, 0.1])
    dear = measured(FORGET | {"mitigation.alpha_scale": 0.99}, [0.7, 0.7, 0.7, 0.7], number=1)
    cheap = measured(FORGET, [0.95, 0.8, 0.6, 0.5], number=2)
    weak = measured(FORGET | {"mitigation.alpha_scale": 0.9999}, [0.98, 0.6, 0.3, 0.2], number=3)
    ruinous = measured(SCALE, [0.5, 0.9, 0.9, 0.9], number=4)
    assert best_settings([baseline, dear, cheap, weak, ruinous], config) == [cheap, ruinous]


@pytest.mark.parametrize(
    ("compared", "said"),
    [
        (
            [measured(NONE, [0.98, 0.5, 0.2, 0.1]), measured(FORGET, [0.95, 0.8, 0.6, 0.5])],
            "Best setting: forget_more alpha_scale 0.999: passkey/recent_exact_beyond 0.15 -> 0.55, at the "
            "training length 0.98 -> 0.95. 95% intervals of recent needles lie apart at 256, 1K, 4K.",
        ),
        (
            [measured(NONE, [0.98, 0.5, 0.2, 0.1]), measured(FORGET, [0.98, 0.52, 0.22, 0.1])],
            "95% intervals of recent needles overlap at every length: not shown to help",
        ),
        (
            [measured(NONE, [0.98, 0.5, 0.2, 0.1]), measured(FORGET, [0.98, 0.4, 0.1, 0.0])],
            "Best setting: none. No mitigation improves passkey/recent_exact_beyond.",
        ),
        (
            [measured(NONE, [0.98, 0.5, 0.0, 0.0]), measured(FORGET, [0.98, 0.9, 0.0, 0.0])],
            "No mitigation improves passkey/recent_exact_beyond. forget_more alpha_scale 0.999: "
            "passkey/recent_exact_beyond 0.00 -> 0.00, at the training length 0.98 -> 0.98. "
            "It does help recent needles at 256.",
        ),
        (
            [measured(NONE, [0.98, 0.5, 0.2, 0.1]), measured(FORGET, [0.6, 0.6, 0.6, 0.6])],
            "Best setting: none. Each costs more than 0.1 in length.",
        ),
    ],
    ids=["helps", "not-shown", "harms", "helps-nearby", "too-dear"],
)
def test_conclusion_is_honest(config, compared, said):
    mended = Mended(model=measured({}, [0.98, 0.5, 0.2, 0.1]), tried=compared, compared=compared)
    assert said in conclusion(mended, results(config))


def test_failed_and_unfinished_trials_are_named(config):
    failed = Failed(name="train/trial-0001", point={}, error="error: loss is not finite in layer 3")
    output = text(results(config, failed=[failed], unfinished=2))
    assert "train/trial-0001  error: loss is not finite in layer 3" in output
    assert "2 trials are left" in output


def test_pareto_front_and_broken_bounds_are_shown(config):
    config.train.objectives = {"val/loss": "minimize", "val/exact": "maximize"}

    def model(number, loss, exact, broken=()):
        one = measured({"model.d_state": number}, [1.0, 0.9, 0.8, 0.7], number=number, value=loss)
        return replace(one, values={"val/loss": loss, "val/exact": exact}, broken=list(broken))

    broken = model(4, 0.1, 1.0, ["peak_memory_mib <= 10"])
    models = [model(1, 1.0, 0.5), model(2, 2.0, 0.9), model(3, 2.5, 0.8), broken, model(5, 1.0, 0.5)]
    found = results(config, models)
    assert [one.number for one in found.pareto] == [1, 5, 2], "equals stand side by side, 3 is beaten by 2"
    output = text(found)
    assert "Pareto front: of these, no model is beaten in all objectives" in output
    assert "front" in row_of(output, "d_state 2")
    assert "breaks peak_memory_mib <= 10" in row_of(output, "d_state 4")
    rows = {row["model.d_state"]: row for row in table_rows(found)}
    assert [rows[n]["pareto"] for n in (1, 2, 3, 4, 5)] == [True, True, False, False, True]
    assert rows[4]["broken"] == "peak_memory_mib <= 10"


def test_a_setting_that_breaks_a_bound_is_not_the_best(config):
    tried = [measured(NONE, [1.0, 0.9, 0.1, 0.1]), measured(FORGET, [1.0, 0.9, 0.5, 0.5])]
    better = measured({**FORGET, "mitigation.alpha_scale": 0.99}, [1.0, 0.9, 0.9, 0.9])
    (best,) = best_settings([*tried, replace(better, broken=["loss/in_length <= 1"])], config)
    assert best.point["mitigation.alpha_scale"] == 0.999


def test_pruned_and_unspent_trials_are_told_apart_from_unfinished_ones(config):
    found = replace(results(config, unfinished=3), pruned=2, unspent=2)
    output = text(found)
    assert "Pruned: 2 training trials ended early (train.pruner)." in output
    assert "Budget spent: 2 trials were not begun; a larger budget goes on." in output
    assert "Not finished: 1 trials are left" in output


def test_figures_are_drawn_for_what_was_measured(config, tmp_path):
    models = [
        measured({"model.d_state": 64}, [0.98, 0.5, 0.2, 0.1], number=0, recall=[0.9, 0.3]),
        measured({"model.d_state": 64}, [0.98, 0.4, 0.2, 0.1], number=1, recall=[0.9, 0.3]),  # another seed
    ]
    grid = [
        measured(FORGET | {"mitigation.alpha_scale": a, "mitigation.insert_scale": i}, [0.95, 0.8, 0.6, 0.5])
        for a in (1.0, 0.999)
        for i in (1.0, 0.75)
    ]
    tried = [measured(NONE, [0.98, 0.5, 0.2, 0.1]), *grid[1:]]
    mended = Mended(model=models[0], tried=tried, compared=tried[:2])
    paths = write_figures(results(config, models, [mended]), tmp_path)
    assert [path.name for path in paths] == [
        "recent_by_length.png",
        "recall_by_length.png",
        "mitigation-0000-recent.png",
        "mitigation-0000-settings.png",
        "mitigation-0000-forget_more.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert write_figures(results(config), tmp_path) == []


def test_table_has_a_row_per_trial(config):
    model = measured({"model.d_state": 64}, [0.98, 0.5, 0.2, 0.1])
    tried = [measured(NONE, [0.98, 0.5, 0.2, 0.1])]
    rows = table_rows(results(config, [model], [Mended(model=model, tried=tried, compared=tried)]))
    assert [row["stage"] for row in rows] == ["train", "mitigation", "confirm"]
    assert rows[0]["model.d_state"] == 64
    assert rows[0]["collapse_length"] == 256
    assert rows[0]["recent_4096"] == 0.1


def test_labels_and_the_line_that_opens_the_records():
    assert (
        describe({"data.train_length": 256, "optim.lr": 0.00123456}, seed=1)
        == "train_length 256, lr 0.00123456, seed 1"
    )
    assert describe(FORGET) == "forget_more alpha_scale 0.999"
    assert describe(SCALE) == "delta_scale 0.9"
    assert describe(NONE) == "none"
    assert describe({"initial_state.name": "zero", "model.d_state": 4}) == "initial_state zero, d_state 4"
    for seed in (0, 1):  # 1 is what a factor is left out at
        assert describe(FORGET, seed) == f"forget_more alpha_scale 0.999, seed {seed}"
        assert describe(SCALE, seed) == f"delta_scale 0.9, seed {seed}"
        assert describe(NONE, seed) == f"none, seed {seed}"
        assert describe({"model.d_state": 1}, seed) == f"d_state 1, seed {seed}"
    assert ui_line("sqlite:///runs/mlflow.db") == "make ui"
    assert ui_line("sqlite:////data/m.db") == "make ui STORE=sqlite:////data/m.db"
    assert ui_line("http://127.0.0.1:5000") == "http://127.0.0.1:5000"

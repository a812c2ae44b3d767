"""A longer training goes on from the shorter one that is otherwise equal; it waits for that one alone."""

import json
import os
from pathlib import Path
from zipfile import ZipFile

import pytest
from optuna.trial import TrialState

from conf.load import parse
from conf.sweep_schema import SweepConfig
from sweeps.planning.plans import plan_points
from sweeps.planning.samplers import point_of
from sweeps.stores.store import Store
from sweeps.stores.studies import enqueue, load_studies, make_study
from sweeps.trials.claims import claim, finish
from sweeps.trials.sharing import find_shared
from sweeps.trials.trial import _Run

STEPS = "trainer.max_steps"


def start(tmp_path, decay: float = 0.1):
    (tmp_path / "base.yaml").write_text(f"optim: {{decay_fraction: {decay}}}\n")
    space = {STEPS: [100, 200, 400], "model.d_state": [16, 64]}
    settings = {"train.base": str(tmp_path / "base.yaml"), "train.space": space, "train.seeds": [0, 1]}
    config = parse(SweepConfig, [{"name": "t", **settings}])
    store = Store(tmp_path, config)
    study = make_study(store, "train", {"loss": "minimize"}, stage="train")
    points = [{STEPS: steps, "model.d_state": n} for n in (16, 64) for steps in (400, 100, 200)]
    enqueue(study, plan_points(points, [0, 1]))
    return store, study


def take_all(store, study):
    taken = []
    while one := claim(store, [study]):
        taken.append(one)
    return taken


def leave_stable(taken) -> Path:
    """The trial ends, and leaves a checkpoint to go on from."""
    checkpoints = taken.run_dir / "checkpoints"
    checkpoints.mkdir(parents=True)
    with ZipFile(checkpoints / "stable.ckpt", "w") as file:
        file.writestr("data", bytes(1000))
    (taken.run_dir / "result.json").write_text(json.dumps({"status": "completed"}))
    finish(taken, {"loss": 1.0}, 1.0)
    taken.lock.release()
    return checkpoints / "stable.ckpt"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """One byte of a thousand zeros, which no reader of the file's directory would notice."""
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)


def test_longer_trials_wait_for_the_shorter_ones_of_their_family(tmp_path):
    store, study = start(tmp_path)
    for steps in (100, 200, 400):
        taken = take_all(store, study)
        assert [point_of(one.trial)[STEPS] for one in taken] == [steps] * 4, "two sizes, two seeds"
        for one in taken:
            shared = find_shared(store, study, one.trial)
            if steps == 100:
                assert shared is None
            else:
                assert shared is not None
                assert (shared.path.name, shared.steps) == ("stable.ckpt", {200: 89, 400: 179}[steps])
                assert shared.why.endswith(f"from step {shared.steps}")
            leave_stable(one)


def test_a_schedule_without_a_stable_phase_shares_nothing_and_says_so(tmp_path):
    store, study = start(tmp_path, decay=1.0)
    taken = take_all(store, study)
    assert len(taken) == 12, "nobody waits"
    for one in taken:
        finish(one, {"loss": 1.0}, 1.0)
        one.lock.release()
    longest = next(one for one in taken if point_of(one.trial)[STEPS] == 400)
    shared = find_shared(store, study, longest.trial)
    assert shared is not None
    assert shared.path is None
    assert "its learning rate has no stable phase (optim.decay_fraction)" in shared.why


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_checkpoint_is_passed_over_for_one_further_back_or_the_start(tmp_path, damage):
    store, study = start(tmp_path)
    left = {}
    for steps in (100, 200):
        left[steps] = [leave_stable(one) for one in take_all(store, study)]
    longest = take_all(store, study)[0]
    assert find_shared(store, study, longest.trial).steps == 179
    for path in left[200]:
        damage(path)
    assert find_shared(store, study, longest.trial).steps == 89
    for path in left[100]:
        damage(path)
    shared = find_shared(store, study, longest.trial)
    assert shared.path is None
    assert shared.why.startswith("begins anew: train/trial-")
    assert shared.why.count("left no" if damage is Path.unlink else "its stable.ckpt is damaged") == 2
    longest.lock.release()


def test_a_checkpoint_damaged_after_it_was_chosen_is_not_read_again(tmp_path, capsys):
    """The trial was interrupted before it had a checkpoint of its own; one that has one goes on from that."""
    store, study = start(tmp_path)
    paths = [leave_stable(one) for one in take_all(store, study)]
    first, second, *_ = take_all(store, study)
    for taken in (first, second):
        assert _Run(taken, stop=lambda: False)._shared().steps == 89
    (second.run_dir / "checkpoints").mkdir(parents=True)
    with ZipFile(second.run_dir / "checkpoints" / "step=0000100.ckpt", "w") as file:
        file.writestr("data", "its own")
    for path in paths:
        cut(path)
    assert _Run(first, stop=lambda: False)._shared() is None
    assert f"{first.name}: begins anew: train/trial-" in capsys.readouterr().out
    assert first.trial.user_attrs["shared"] is None
    assert _Run(second, stop=lambda: False)._shared().steps == 89
    cut(second.run_dir / "checkpoints" / "step=0000100.ckpt")
    assert _Run(second, stop=lambda: False)._shared() is None
    for taken in (first, second):
        taken.lock.release()


def test_sweep_trains_the_longer_budget_anew_where_the_shorter_ones_checkpoint_is_damaged(sweep):
    sweep.run("train.space={model: {d_state: [16]}, trainer: {max_steps: [20, 10]}}", DAMAGE_STABLE="1")
    (study,) = load_studies(sweep.study_dir)
    assert [t.state for t in study.get_trials()] == [TrialState.COMPLETE] * 2
    result = json.loads((sweep.study_dir / "train/trial-0000/result.json").read_text())
    assert (result["continued_from"], result["steps"]) == (None, 20)
    logs = "".join(path.read_text() for path in sweep.study_dir.glob("workers/*"))
    assert "trial-0000: begins anew: train/trial-0001: its stable.ckpt is damaged" in logs


def test_sweep_trains_a_longer_budget_from_the_shorter_ones_checkpoint(sweep):
    sweep.run("train.space={model: {d_state: [16]}, trainer: {max_steps: [20, 10]}}")
    (study,) = load_studies(sweep.study_dir)
    longer, shorter = study.get_trials()
    assert [t.state for t in (longer, shorter)] == [TrialState.COMPLETE] * 2
    assert longer.datetime_start > shorter.datetime_complete
    result = json.loads((sweep.study_dir / "train/trial-0000/result.json").read_text())
    assert result["continued_from"].endswith("train/trial-0001/checkpoints/stable.ckpt")
    assert longer.user_attrs["continues"] == "train/trial-0001/checkpoints/stable.ckpt"
    assert [t.user_attrs["tokens"] for t in (longer, shorter)] == [12 * 256, 10 * 256]
    identity = json.loads((sweep.study_dir / "train/trial-0000/trial.json").read_text())
    assert identity["continues"] == longer.user_attrs["continues"]

"""A longer training goes on from the shorter one that is otherwise equal; it waits for that one alone."""

import json

from optuna.trial import TrialState

from conf.load import parse
from conf.sweep_schema import SweepConfig
from sweeps.claims import claim, finish
from sweeps.plans import plan_points
from sweeps.samplers import point_of
from sweeps.sharing import find_shared
from sweeps.store import Store
from sweeps.studies import enqueue, load_studies, make_study

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
            (one.run_dir / "checkpoints").mkdir(parents=True)
            (one.run_dir / "checkpoints" / "stable.ckpt").touch()
            (one.run_dir / "result.json").write_text(json.dumps({"status": "completed"}))
            finish(one, {"loss": 1.0}, 1.0)
            one.lock.release()


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

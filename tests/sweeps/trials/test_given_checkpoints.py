"""Mitigations tuned on models that are there already: none is trained, each mitigation has its budget."""

import json

from optuna.trial import TrialState

from sweeps.planning.samplers import point_of
from sweeps.report import make_console
from sweeps.stores.studies import load_studies


def test_each_mitigation_is_tuned_on_validation_text_and_reported_on_test_text(sweep):
    sweep.run("train.space={model.d_state: [64]}", "workers=1")
    trained = sweep.study_dir / "train" / "trial-0000"
    before = sorted(path.name for path in trained.iterdir())
    given = ["name=mend", f"train.checkpoints=[{trained.relative_to(sweep.folder)}]"]
    tuned = ["mitigation.yaml", *given, "mitigation.sampler=tpe", "mitigation.budget.trials=2"]
    output = sweep.run(*tuned)
    study_dir = sweep.folder / "runs" / "mend"
    studies = {study.study_name: study for study in load_studies(study_dir)}
    assert list(studies) == ["train", "mitigation-0000", "confirm-0000"]
    (only,) = studies["train"].get_trials()
    assert (only.state, point_of(only)) == (TrialState.COMPLETE, {"checkpoint": str(trained.resolve())})
    tried = [point_of(trial)["mitigation.name"] for trial in studies["mitigation-0000"].get_trials()]
    assert tried == ["none", *["forget_more", "delta_scale"] * 2]
    compared = [point_of(trial)["mitigation.name"] for trial in studies["confirm-0000"].get_trials()]
    assert compared == ["none", "forget_more", "delta_scale"]
    assert "Best setting: forget_more alpha_scale" in output
    for stage, split in (
        ("train/trial-0000/evaluation", "validation"),
        ("mitigation-0000", "validation"),
        ("confirm-0000", "test"),
    ):
        configs = list((study_dir / stage).glob("**/config.yaml"))
        assert configs
        assert all(f"split: {split}\n" in config.read_text() for config in configs)
    evaluation = json.loads((study_dir / "mitigation-0000" / "trial-0001" / "evaluation.json").read_text())
    assert evaluation["checkpoint"] == str(trained.resolve())
    assert sorted(path.name for path in trained.iterdir()) == before
    assert "Best setting" in sweep.run(*tuned)  # nothing is done again
    assert len(studies["mitigation-0000"].get_trials()) == 5
    output = sweep.run(*tuned, "train.checkpoints=[]", status=2)
    assert "holds a sweep made with" in output


def test_a_list_of_paths_is_no_markup(capsys):
    make_console().print("To go on:  python -m sweeps.run train.checkpoints=[/runs/mine]")
    assert "train.checkpoints=[/runs/mine]" in capsys.readouterr().out

"""A worker that trains its trials side by side: each is still a trial with a directory of its own."""

import json

import pytest

from conf.schema import TrainConfig
from lightning_modules.mlflow_store import connect
from sweeps.trials.side_by_side import share_of, train_together
from tests.sweeps.conftest import SweepProcess

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")


def test_the_share_leaves_work_for_the_other_workers():
    assert [share_of(n, 8, 4) for n in (0, 1, 4, 5, 12, 32, 100)] == [1, 1, 1, 2, 3, 8, 8]


def test_what_has_a_result_is_left_out_and_one_alone_is_not_worth_it(tmp_path):
    calls = []

    def spawn(line, log):
        calls.append((line[-1], log))
        return 0

    configs = {tmp_path / name: TrainConfig() for name in "abc"}
    train_together(dict([*configs.items()][:1]), spawn)
    assert not calls
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "result.json").write_text("{}")
    train_together(configs, spawn)
    assert calls == [(f"run_dirs=[{tmp_path}/b,{tmp_path}/c]", tmp_path / "b" / "log.txt")]
    assert str(tmp_path / "b" / "log.txt") in (tmp_path / "c" / "log.txt").read_text()


@pytest.mark.timeout(180)
def test_trials_of_one_process_keep_their_identity(sweep: SweepProcess):
    """Trained for real, judged by the stand-in."""
    store = f"sqlite:///{sweep.folder}/mlflow.db"
    tracked = "tracking={enabled: true, uri: " + f"'{store}'" + "}"
    cpu = "train.overrides={trainer: {accelerator: cpu}}"
    sweep.run(
        "workers=1", "side_by_side=3", "threads=1", tracked, cpu, "train.space={model.d_state: [8, 16, 32]}"
    )
    folders = [sweep.study_dir / "train" / f"trial-{i:04d}" for i in range(3)]
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    assert all(result["status"] == "completed" and result["steps"] == 10 for result in results)
    assert all((folder / "checkpoints" / "step=0000010.ckpt").exists() for folder in folders)
    said = [(folder / "log.txt").read_text() for folder in folders]
    assert said[0].count("lightning_modules.train_side_by_side") == 1
    assert not any("-m lightning_modules.train " in text for text in said)
    client = connect(store)
    runs = [client.get_run(result["mlflow_run_id"]) for result in results]
    assert [run.data.tags["trial"] for run in runs] == [f"train/trial-000{i}" for i in range(3)]
    assert [run.data.params["model.d_state"] for run in runs] == ["8", "16", "32"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len({run.data.tags["mlflow.parentRunId"] for run in runs}) == 1

"""The shipped smoke sweep with the real commands, killed while it trains and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules.checkpoints import load_model
from sweeps import register

ROOT = Path(__file__).parents[2]


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, f"the sweep ended with {process.returncode}"
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.05)


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "sweeps.run", "conf/sweep/smoke.yaml", f"study_dir={tmp_path}/study"),
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
        *("train.space.model.d_state=[8]", "workers=1", "threads=1"),
        "train.overrides.trainer={max_steps: 150, checkpoint_every: 20, log_every: 10}",
    ]


def test_real_sweep_survives_a_kill_and_doubles_nothing(command, tmp_path):
    study = tmp_path / "study"
    trial = study / "train" / "trial-0000"
    with (tmp_path / "output.txt").open("w") as output:
        first = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        wait_for(trial / "checkpoints" / "step=0000040.ckpt", first)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    assert not (trial / "result.json").exists()

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "unsolved" in again.stdout
    assert "Best setting: none." in again.stdout
    assert f"make ui STORE=sqlite:///{tmp_path}/mlflow.db" in again.stdout
    for line in again.stdout.partition("Figures:\n")[2].splitlines()[:5]:
        assert Path(line.strip()).is_file()

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "longstate"]
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    assert Counter(parent_name(run, runs) for run in runs.values()) == {
        None: 2,  # the stages
        "smoke/train": 1,
        "trial-0000": 1,  # the evaluation of what it trained
        "smoke/mitigation-0000": 4,  # baseline and setting, tried and compared
    }
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for run_id, run in runs.items():
        for key in run.data.metrics:
            steps = [point.step for point in client.get_metric_history(run_id, key)]
            assert len(steps) == len(set(steps)), f"{run.info.run_name}: {key} doubled"
    (train,) = [run for run in runs.values() if parent_name(run, runs) == "smoke/train"]
    assert [p.step for p in client.get_metric_history(train.info.run_id, "train/loss")] == list(
        range(10, 160, 10)
    )
    (stage,) = [run for run in runs.values() if run.info.run_name == "smoke/mitigation-0000"]
    assert {file.path for file in client.list_artifacts(stage.info.run_id)} >= {
        "report.txt",
        "report.html",
        "results.csv",
        "figures",
    }

    require_registered(study, tmp_path, client, train)

    by_hand = [sys.executable, "-m", "lightning_modules.train", str(trial / "config.yaml")]
    done = subprocess.run(by_hand, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(f"completed: {trial}/result.json"), done.stdout + done.stderr
    lose_runs_and_find_them(client, tmp_path)


def lose_runs_and_find_them(client: MlflowClient, tmp_path: Path) -> None:
    """Params, points with their times, tags and files are as before; a run from the trash has its old id."""
    before = snapshot(client)
    assert len(before) == 8
    trash = before["smoke/mitigation-0000/trial-0001"]["id"]
    client.delete_run(trash)
    gone = ["smoke/train", "smoke/train/trial-0000", "smoke/mitigation-0000/trial-0000"]
    gone.append("smoke/train/trial-0000/trial-0000-evaluation")
    assert set(gone) < set(before)
    for name in gone:
        client._tracking_client.store._hard_delete_run(before[name]["id"])

    study = f"study={tmp_path}/study"
    reconciled = [sys.executable, "-m", "sweeps.reconcile", study]
    first, second = (
        subprocess.run(reconciled, cwd=ROOT, capture_output=True, text=True, timeout=120) for _ in range(2)
    )
    assert first.returncode == second.returncode == 0, first.stdout + first.stderr
    assert f"MLflow run {trash} (trial-0001): was deleted; restored" in first.stdout
    for name in gone:
        assert f"MLflow run {before[name]['id']} (" in first.stdout
    assert first.stdout.count("was deleted; made anew from its directory as") == 4
    assert second.stdout == "Nothing to repair.\n"

    after = snapshot(client)
    assert set(after) == set(before)
    for name, was in before.items():
        run = after[name]
        assert run["params"] == was["params"], name
        assert run["points"] == was["points"], name
        assert set(run["files"]) >= set(was["files"]), name
        if name != "smoke/train":  # the sweep's report as it is now, a later stage included
            assert run["files"] == was["files"], name
        assert run["tags"] == was["tags"], name
        assert run["status"] == was["status"] == "FINISHED"
        assert (run["id"] == was["id"]) == (name not in gone)
        if name in gone:
            assert run["replaces"] == was["id"]
            assert was["start"] - 1000 <= run["start"] <= run["end"] <= was["end"] + 1000
    trial = tmp_path / "study" / "train" / "trial-0000"
    for file, key in (
        ("tracking.json", "run_id"),
        ("trial.json", "mlflow_run_id"),
        ("result.json", "mlflow_run_id"),
    ):
        assert json.loads((trial / file).read_text())[key] == after["smoke/train/trial-0000"]["id"]


# What only the lost run knew, or what names runs by their ids.
UNKNOWN = ("host", "python", "torch", "git_dirty", "replaces", "mlflow.parentRunId")


def snapshot(client: MlflowClient) -> dict[str, dict]:
    """All runs, by the names from the stage down."""
    (experiment,) = [e for e in client.search_experiments() if e.name == "longstate"]
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    found = {}
    for run_id, run in runs.items():
        names, above = [run.info.run_name], run.data.tags.get("mlflow.parentRunId")
        while above:
            names.insert(0, runs[above].info.run_name)
            above = runs[above].data.tags.get("mlflow.parentRunId")
        points = {key: client.get_metric_history(run_id, key) for key in run.data.metrics}
        tags = {
            k: v
            for k, v in run.data.tags.items()
            if k not in UNKNOWN and "source" not in k and "user" not in k
        }
        name = "/".join(names)
        assert name not in found or name.startswith("smoke/mitigation-0000")
        while name in found:  # tried and compared: their directories have equal names
            name += "'"
        found[name] = {
            "id": run_id,
            "status": run.info.status,
            "start": run.info.start_time,
            "end": run.info.end_time,
            "params": run.data.params,
            "points": {k: sorted((p.step, p.value, p.timestamp) for p in ps) for k, ps in points.items()},
            "files": sorted(files_of(client, run_id)),
            "tags": tags,
            "replaces": run.data.tags.get("replaces"),
        }
    return found


def files_of(client: MlflowClient, run_id: str, folder: str | None = None) -> list[str]:
    found = []
    for file in client.list_artifacts(run_id, folder):
        found += files_of(client, run_id, file.path) if file.is_dir else [file.path]
    return found


def require_registered(study: Path, tmp_path: Path, client: MlflowClient, run: Run) -> None:
    """One command registers the best model with its card, once; transformers loads what it fetches."""
    for _ in range(2):
        assert register.main([f"study={study}", "name=smoke"]) == 0
    (version,) = client.search_model_versions("name = 'smoke'")
    assert version.run_id == run.info.run_id
    assert client.get_model_version_by_alias("smoke", "best").version == version.version
    card = version.description
    assert "- 150 steps at 128 tokens" in card
    assert "## Passkey" in card
    assert "| 128 | 0.00" in card
    assert version.tags["trial"] == "0000"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
        folder = download_artifacts("models:/smoke@best")
    assert card in (Path(folder) / "README.md").read_text()
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("The pass key is")["input_ids"]])
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder), load_model(study / "train" / "trial-0000")
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-4, rtol=1e-4)
    register.main([f"study={study}", "name=smoke", "stage=confirm"])
    assert len(client.search_model_versions("name = 'smoke'")) == 2
    for wrong in ("trial=7", "name=a/b"):
        with pytest.raises(SystemExit):
            register.main([f"study={study}", "name=smoke", wrong])


def parent_name(run: Run, runs: dict[str, Run]) -> str | None:
    parent = run.data.tags.get("mlflow.parentRunId")
    return runs[parent].info.run_name if parent else None

"""A training run from the command line to its result, and the ways it may end."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

from lightning_modules.checkpoints import list_checkpoints, load_config, load_model
from lightning_modules.mlflow_store import connect
from tests.lightning_modules.launcher import start_train, train, wait_until

ROOT = Path(__file__).parents[2]
SMALL = [
    *("model.d_model=32", "model.n_layers=2", "model.d_state=16", "model.headdim=16", "model.chunk_size=32"),
    *("data.train_length=128", "data.batch_size=4", "data.val_sequences=4", "optim.warmup_steps=5"),
    *("trainer.max_steps=12", "trainer.threads=1", "trainer.log_every=2", "trainer.val_every=5"),
    *("trainer.checkpoint_every=4",),
]
UNTRACKED = [*SMALL, "tracking.enabled=false"]
ENDLESS = ["trainer.max_steps=100000", "trainer.checkpoint_every=100000", "trainer.val_every=100000"]


def read_result(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


def test_the_smoke_config_runs_replays_and_repeats(tmp_path: Path) -> None:
    """The documented commands, the first in a process from the start of Python."""
    store = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "lightning_modules.train", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    first, again = tmp_path / "first", tmp_path / "again"
    done = run("conf/train/smoke.yaml", f"run_dir={first}", store, "trainer.threads=1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for word in ("parameters", "state", "decayed", "not decayed", "A_log", "val/exact", "tokens_per_second"):
        assert word in done.stdout, word
    result = read_result(first)
    assert (result["status"], result["command"], result["steps"]) == ("completed", "train", 20)
    for name in ("val/loss", "val/exact", "val/digits", "train/loss", "tokens", "tokens_per_second"):
        assert isinstance(result["metrics"][name], float), name
    assert result["metrics"]["tokens"] == 20 * 8 * 128
    assert (first / result["checkpoint"]).is_file()
    run_info = connect(f"sqlite:///{tmp_path}/mlflow.db").get_run(result["mlflow_run_id"])
    assert run_info.info.status == "FINISHED"
    assert run_info.data.params["model.d_model"] == "32"
    assert run_info.data.tags["seed"] == "0"

    # A completed run answers with its result; the file does not change.
    before = (first / "result.json").read_bytes()
    for command in (["conf/train/smoke.yaml", f"run_dir={first}"], [str(first / "config.yaml")]):
        replay = run(*command)
        assert replay.returncode == 0, replay.stderr
        assert f"completed: {first / 'result.json'}" in replay.stdout
    assert (first / "result.json").read_bytes() == before

    repeat = train([str(first / "config.yaml"), f"run_dir={again}"], tmp_path / "again.txt")
    assert repeat == 0, (tmp_path / "again.txt").read_text()
    for name, value in load_model(first).state_dict().items():
        assert torch.equal(value, load_model(again).state_dict()[name]), name

    other = run(str(first / "config.yaml"), "seed=1")
    assert other.returncode == 2
    assert other.stderr.splitlines() == [
        f"error: {first}: belongs to a run with seed=0, this one has seed=1: choose another run_dir"
    ]


def test_documents_train_and_their_loss_falls(tmp_path: Path) -> None:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    (tmp_path / "texts").mkdir()
    for seed in range(5):
        text = " ".join(random.Random(seed).choices(words, k=1000))
        (tmp_path / "texts" / f"{seed}.txt").write_text(text)
    argv = [*UNTRACKED, "data.name=documents", f"data.documents.source={tmp_path}/texts", "optim.lr=1e-2"]
    argv += ["trainer.max_steps=40", "data.documents.val_fraction=0.4", f"run_dir={tmp_path}/run"]
    assert train(argv, tmp_path / "output.txt") == 0, (tmp_path / "output.txt").read_text()
    metrics = read_result(tmp_path / "run")["metrics"]
    assert metrics["val/loss"] < 3.0  # from log(256) = 5.5
    assert "val/exact" not in metrics


def test_the_result_is_a_model_that_loads(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert train([*UNTRACKED, f"run_dir={run_dir}"], tmp_path / "output.txt") == 0
    assert [p.name for p in list_checkpoints(run_dir / "checkpoints")] == [
        "step=0000012.ckpt",
        "step=0000008.ckpt",
    ]
    assert (run_dir / "checkpoints" / "last.ckpt").resolve().name == "step=0000012.ckpt"
    assert load_config(run_dir).data.train_length == 128
    logits = load_model(run_dir)(torch.randint(256, (1, 50))).logits
    assert logits.isfinite().all()


def test_two_processes_on_one_run_directory(tmp_path: Path) -> None:
    argv, output = [*UNTRACKED, *ENDLESS, f"run_dir={tmp_path}/run"], tmp_path / "output.txt"
    process = start_train(argv, output)
    assert wait_until((tmp_path / "run" / "metrics.jsonl").exists, process)
    assert train(argv, tmp_path / "second.txt") == 2
    lines = (tmp_path / "second.txt").read_text().splitlines()
    assert len(lines) == 1
    assert f"another process (pid {process.pid} on" in lines[0]
    process.kill()
    process.join()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "ctrl-c"])
def test_a_signal_saves_then_reads_killed_and_the_run_goes_on(tmp_path: Path, signum: int) -> None:
    uri, run_dir, output = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run", tmp_path / "output.txt"
    argv = [*SMALL, "trainer.checkpoint_every=100000", f"tracking.uri={uri}", f"run_dir={run_dir}"]
    argv += ["trainer.max_steps=60", "trainer.accumulate=2"]
    process = start_train(argv, output)
    assert wait_until((run_dir / "metrics.jsonl").exists, process)
    assert process.pid is not None
    os.kill(process.pid, signum)
    process.join()
    assert process.exitcode == 128 + signum, output.read_text()
    assert "Traceback" not in output.read_text()
    assert f"stopped by {signal.Signals(signum).name}; the same command continues" in output.read_text()
    (saved,) = list_checkpoints(run_dir / "checkpoints")
    assert (run_dir / "checkpoints" / "last.ckpt").resolve() == saved.resolve()
    run_id = json.loads((run_dir / "tracking.json").read_text())["run_id"]
    assert connect(uri).get_run(run_id).info.status == "KILLED"
    assert not (run_dir / "result.json").exists()

    assert train(argv, output) == 0, output.read_text()
    assert f"continuing from {saved}" in output.read_text()
    assert read_result(run_dir)["mlflow_run_id"] == run_id
    assert connect(uri).get_run(run_id).info.status == "FINISHED"
    history = connect(uri).get_metric_history(run_id, "train/loss")
    assert sorted(point.step for point in history) == list(range(2, 61, 2))


def test_a_loss_that_is_not_finite_stops_with_the_layer_named(tmp_path: Path) -> None:
    uri, run_dir, output = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run", tmp_path / "output.txt"
    argv = [
        *SMALL,
        f"tracking.uri={uri}",
        f"run_dir={run_dir}",
        "optim.lr=1e30",
        "trainer.checkpoint_every=1",
    ]
    assert train(argv, output) == 1
    last = output.read_text().splitlines()[-1]
    assert last.startswith(f"error: {run_dir}: after step ")
    assert "first not finite: the output of backbone." in last or "the input of backbone." in last
    assert "Traceback" not in output.read_text()
    for path in list_checkpoints(run_dir / "checkpoints"):
        assert all(value.isfinite().all() for value in load_model(path).state_dict().values())
    assert list_checkpoints(run_dir / "checkpoints")
    run_id = json.loads((run_dir / "tracking.json").read_text())["run_id"]
    assert connect(uri).get_run(run_id).info.status == "FAILED"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.train_length=64"], "data.train_length=64: a passkey prompt needs at least"),
        (["data.name=documents", "data.documents.source={path}/none"], "data.documents.source="),
        (["tracking.enabled=true", "tracking.uri=http://127.0.0.1:9"], "tracking.uri=http://127.0.0.1:9"),
    ],
    ids=["passkey-too-long", "no-documents", "no-server"],
)
def test_a_mistake_found_late_is_still_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    argv = [*UNTRACKED, f"run_dir={tmp_path}/run", *(a.format(path=tmp_path) for a in arguments)]
    assert train(argv, tmp_path / "output.txt") == 2
    lines = (tmp_path / "output.txt").read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {message}")


def test_a_completed_run_sends_what_its_store_had_refused(tmp_path: Path) -> None:
    """The store breaks after the run has started; the run goes on, and the next start completes the store."""
    uri, run_dir, output = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run", tmp_path / "output.txt"
    argv = [*SMALL, f"tracking.uri={uri}", f"run_dir={run_dir}", "trainer.max_steps=100"]
    process = start_train(argv, output)
    assert wait_until((run_dir / "metrics.jsonl").exists, process)
    with closing(sqlite3.connect(tmp_path / "mlflow.db", timeout=30)) as database:
        database.execute(
            "CREATE TRIGGER full BEFORE INSERT ON metrics BEGIN SELECT RAISE(FAIL, 'disk is full'); END"
        )
        process.join()
        assert process.exitcode == 0, output.read_text()
        warnings = [line for line in output.read_text().splitlines() if line.startswith("warning: ")]
        assert len(warnings) == 2  # when it broke, and what is left at the end
        assert not read_result(run_dir)["tracking_complete"]
        database.execute("DROP TRIGGER full")
    assert train(argv, output) == 0, output.read_text()
    result = read_result(run_dir)
    assert result["tracking_complete"]
    assert connect(uri).get_run(result["mlflow_run_id"]).info.status == "FINISHED"
    points = connect(uri).get_metric_history(result["mlflow_run_id"], "train/loss")
    assert sorted(point.step for point in points) == list(range(2, 101, 2))

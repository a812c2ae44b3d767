"""Runs trained side by side leave what each would have left alone: weights bit for bit, metrics, results."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.load import parse, to_yaml
from conf.schema import TrainConfig
from lightning_modules.checkpoints import load_config, read_weights
from lightning_modules.run_dir import open_run_dir
from lightning_modules.side_by_side import UNFINISHED, Lane, train_side_by_side
from lightning_modules.train import train
from tests.lightning_modules.test_resume import TIMINGS

BASE = (
    "conf/train/smoke.yaml",
    "data={train_length: 256, batch_size: 2, curriculum_length: 128, curriculum_steps: 3, val_sequences: 5}",
    "trainer={max_steps: 8, val_every: 4, log_every: 2, accelerator: cpu, threads: 1}",
    "tracking.enabled=false",
)
KINDS = ("zero", "passed", "carried", "fitted_noise")
ROOT = Path(__file__).parents[2]


def config_of(kind: str, *more: str) -> TrainConfig:
    return parse(TrainConfig, [*BASE, f"initial_state.name={kind}", f"seed={KINDS.index(kind)}", *more])


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same runs by lightning_modules.train, one by one."""
    folder = tmp_path_factory.mktemp("alone")
    os.chdir(ROOT)
    for kind in KINDS:
        train(folder / kind, config_of(kind))
    return {kind: folder / kind for kind in KINDS}


def require_equal(path: Path, other: Path) -> None:
    ours, theirs = read_weights(path), read_weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    results: list[dict[str, Any]] = [json.loads((p / "result.json").read_text()) for p in (path, other)]
    for name in ("val/loss", "val/exact", "train/loss", "train/grad_norm", "train/lr", "tokens"):
        assert results[0]["metrics"][name] == results[1]["metrics"][name], name
    assert results[0].keys() == results[1].keys()
    points = [
        [_without_time(line) for line in (p / "metrics.jsonl").read_text().splitlines()]
        for p in (path, other)
    ]
    assert points[0] == points[1]


def _without_time(line: str) -> dict[str, Any]:
    point = json.loads(line)
    point.pop("time")
    metrics = {name: value for name, value in point["metrics"].items() if name not in TIMINGS}
    return point | {"metrics": metrics}


def test_every_run_equals_its_lonely_twin(alone: dict[str, Path], tmp_path: Path) -> None:
    runs = [open_run_dir(tmp_path / kind, config_of(kind)) for kind in KINDS]
    assert train_side_by_side(runs) == {}
    for kind in KINDS:
        require_equal(tmp_path / kind, alone[kind])
        assert load_config(tmp_path / kind).initial_state.name == kind
        assert (tmp_path / kind / "checkpoints" / "last.ckpt").exists()
        assert not (tmp_path / kind / UNFINISHED).exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [2, 5])
def test_a_stopped_run_goes_on_to_the_same_end(
    alone: dict[str, Path], tmp_path: Path, kind: str, stop: int
) -> None:
    lane = Lane(open_run_dir(tmp_path, config_of(kind)))
    for _ in range(stop):
        lane.advance()
    lane.save_unfinished()
    lane.close("KILLED")
    assert train_side_by_side([open_run_dir(tmp_path, config_of(kind))]) == {}
    require_equal(tmp_path, alone[kind])


def test_accumulated_gradients_too(tmp_path: Path) -> None:
    config = config_of("zero", "trainer.accumulate=2")
    train(tmp_path / "alone", config)
    assert train_side_by_side([open_run_dir(tmp_path / "beside", config)]) == {}
    require_equal(tmp_path / "beside", tmp_path / "alone")


def test_one_that_fails_leaves_the_others_alone(alone: dict[str, Path], tmp_path: Path) -> None:
    broken = open_run_dir(tmp_path / "broken", config_of("zero", "optim.lr=1e30", "optim.grad_clip=0"))
    good = open_run_dir(tmp_path / "good", config_of("passed"))
    failed = train_side_by_side([broken, good])
    assert list(failed) == [tmp_path / "broken"]
    assert "not finite" in failed[tmp_path / "broken"]
    assert not (tmp_path / "broken" / "result.json").exists()
    require_equal(tmp_path / "good", alone["passed"])


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ("trainer.precision=bf16-mixed", "32-true"),
        ("probe.factor=2", "probe.factor at 0"),
        ("trainer.devices=2", "devices=1"),
        ("trainer={accelerator: auto, cuda_graphs: true}", "leave trainer.cuda_graphs out"),
    ],
)
def test_what_it_cannot_do_is_refused(setting: str, remedy: str, tmp_path: Path) -> None:
    run = open_run_dir(tmp_path, config_of("zero", setting))
    with pytest.raises(ValueError, match=rf"\Aside_by_side=[^\n]*{remedy}[^\n]*\Z"):
        train_side_by_side([run])
    run.close()


@pytest.mark.timeout(120)
def test_the_command_stops_in_order_and_goes_on(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder, seed in zip(folders, (0, 1), strict=True):
        folder.mkdir()
        config = config_of("zero", f"seed={seed}", "trainer.max_steps=150", "trainer.val_every=150")
        (folder / "config.yaml").write_text(to_yaml(config))
    listed = f"run_dirs=[{','.join(map(str, folders))}]"
    command = [sys.executable, "-m", "lightning_modules.train_side_by_side", listed]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = folders[1] / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command continues" in output
    assert all((folder / UNFINISHED).exists() for folder in folders)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("continuing from step") == 2
    assert all(json.loads((folder / "result.json").read_text())["steps"] == 150 for folder in folders)

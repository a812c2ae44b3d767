"""Killed with SIGKILL at any moment and started again, a run ends as if nothing had happened."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.checkpoints import list_checkpoints
from lightning_modules.mlflow_store import connect
from tests.lightning_modules.launcher import start_train, train, wait_until

# Validation, checkpoints and logged points fall on different steps; the length changes at step 9.
SETTINGS = [
    *("model.d_model=32", "model.n_layers=2", "model.d_state=16", "model.headdim=16", "model.chunk_size=32"),
    *("data.train_length=208", "data.curriculum_length=104", "data.curriculum_steps=9", "data.batch_size=4"),
    *("data.val_sequences=6", "optim.warmup_steps=5", "trainer.max_steps=32", "trainer.threads=1"),
    *("trainer.log_every=2", "trainer.val_every=6", "trainer.checkpoint_every=4"),
]
RESETS = "initial_state.reset_probability=0.2"
CONSECUTIVE = [
    *("data.name=documents", "data.documents.layout=consecutive", "data.documents.max_tokens=200000"),
    *("data.curriculum_length=null", "data.curriculum_steps=0"),
]
CARRIED = ["initial_state.name=carried", "initial_state.bptt_segments=3"]
TIMINGS = {"train/tokens_per_second", "tokens_per_second", "train/peak_memory_mib", "peak_memory_mib"}


def read_result(run_dir: Path) -> dict[str, float]:
    metrics = json.loads((run_dir / "result.json").read_text())["metrics"]
    return {name: value for name, value in metrics.items() if name not in TIMINGS}


def read_history(uri: str, run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Every point of every metric in MLflow, timings aside, by step."""
    run_id = json.loads((run_dir / "result.json").read_text())["mlflow_run_id"]
    client = connect(uri)
    keys = [key for key in client.get_run(run_id).data.metrics if key not in TIMINGS]
    return {key: sorted((m.step, m.value) for m in client.get_metric_history(run_id, key)) for key in keys}


def last_step(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def assert_equal(a: Any, b: Any, where: str) -> None:
    """Bitwise equality of nested checkpoint contents."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(["trainer.accumulate=2"], id="accumulate"),
        pytest.param(["trainer.precision=bf16-mixed", "data.num_workers=1"], id="bf16-workers"),
        pytest.param(["trainer.accumulate=2", "initial_state.name=passed", RESETS], id="passed"),
        pytest.param(["initial_state.name=fitted_noise", RESETS], id="fitted-noise"),
        pytest.param([*CONSECUTIVE, "trainer.accumulate=2", *CARRIED, RESETS], id="carried"),
    ],
)
def test_a_run_killed_at_random_moments_ends_bit_identical(tmp_path: Path, extra: list[str]) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    argv = [*SETTINGS, *extra, f"tracking.uri={uri}"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    output = tmp_path / "output.txt"
    assert train([*argv, f"run_dir={whole}"], output) == 0, output.read_text()

    kills, rng = 0, random.Random()
    while True:
        process = start_train([*argv, f"run_dir={killed}"], output)
        target = last_step(killed) + rng.randint(3, 13)
        alive = wait_until(lambda target=target: last_step(killed) >= target, process)
        process.join(rng.random() * 0.03)
        if not alive or not process.is_alive():
            process.join()
            assert process.exitcode == 0, output.read_text()
            break
        process.kill()
        process.join()
        kills += 1
    assert kills >= 2, "the run was over before it could be killed: nothing was tested"

    first, second = (
        torch.load(list_checkpoints(d / "checkpoints")[0], weights_only=True) for d in (whole, killed)
    )
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "rng", "step", "loops", "initial_state"):
        assert_equal(first[part], second[part], part)
    assert read_result(whole) == read_result(killed)
    history = read_history(uri, killed)
    assert history == read_history(uri, whole)
    for key, points in history.items():
        steps = [step for step, _ in points]
        expected = range(6, 31, 6) if key.startswith("val/") else range(2, 33, 2)
        # 32 is no multiple of val_every: the run ends with one more validation.
        assert steps == sorted({*expected, 32}), key


def test_a_run_killed_during_a_validation_validates_again(tmp_path: Path) -> None:
    slow = ["data.val_sequences=300", "trainer.max_steps=9", "trainer.log_every=4", "trainer.val_every=4"]
    argv = [*SETTINGS, *slow, "data.curriculum_steps=2", "tracking.enabled=false", f"run_dir={tmp_path}/run"]
    run_dir, output = tmp_path / "run", tmp_path / "output.txt"
    process = start_train(argv, output)
    # Step 8's training point is written, its validation begins, and only then would come its checkpoint.
    assert wait_until(lambda: last_step(run_dir) == 8, process)
    process.join(0.1)
    process.kill()
    process.join()
    assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == ["step=0000004.ckpt"]
    assert train(argv, output) == 0, output.read_text()
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "val/loss" in r["metrics"]] == [4, 8, 9]


def test_a_truncated_checkpoint_is_passed_over_with_one_line(tmp_path: Path) -> None:
    argv = [*SETTINGS, "tracking.enabled=false", "trainer.keep_last=3"]
    whole, broken, output = tmp_path / "whole", tmp_path / "broken", tmp_path / "output.txt"
    assert train([*argv, f"run_dir={whole}"], output) == 0, output.read_text()
    process = start_train([*argv, f"run_dir={broken}"], output)
    assert wait_until(lambda: len(list_checkpoints(broken / "checkpoints")) == 3, process)
    process.kill()
    process.join()
    newest, before, *_ = list_checkpoints(broken / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:20_000])

    output.unlink()
    assert train([*argv, f"run_dir={broken}"], output) == 0, output.read_text()
    warnings = [line for line in output.read_text().splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert str(newest) in warnings[0]
    assert f"continuing from {before}" in output.read_text()
    assert read_result(whole) == read_result(broken)


def test_damaged_checkpoints_only_are_refused(tmp_path: Path) -> None:
    argv = [*SETTINGS, "tracking.enabled=false", f"run_dir={tmp_path}/run"]
    folder, output = tmp_path / "run" / "checkpoints", tmp_path / "output.txt"
    folder.mkdir(parents=True)
    (folder / "step=0000004.ckpt").write_bytes(b"not a checkpoint")
    assert train(argv, output) == 2
    assert "error: " in output.read_text().splitlines()[-1]
    assert "none of its 1 checkpoints can be read" in output.read_text().splitlines()[-1]

"""A run under a pruner: rank 0 asks after each validation, and all ranks end at the same step, saved."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_modules.checkpoints import checkpoint_path, read_checkpoint
from lightning_modules.verdict import VARIABLE, await_verdict, write_verdict
from tests.lightning_modules.test_ranks import SETTINGS

ROOT = Path(__file__).parents[2]


def validated(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    records = [json.loads(line) for line in lines]
    return max((r["step"] for r in records if "val/loss" in r["metrics"]), default=0)


@pytest.mark.timeout(180)
def test_two_ranks_stop_together_with_a_checkpoint_and_a_result(tmp_path):
    run_dir, verdict = tmp_path / "run", tmp_path / "verdict.json"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [*SETTINGS, "trainer.max_steps=40", f"run_dir={run_dir}", "trainer.devices=2"]
    command = [sys.executable, "-m", "lightning_modules.train", *argv, "trainer.accelerator=cpu"]
    ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), VARIABLE: str(verdict)}
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | ranks | {"LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        for step in (3, 6, 9):
            while validated(run_dir) < step:
                assert all(process.poll() is None for process in processes)
                time.sleep(0.02)
            time.sleep(0.3)
            assert validated(run_dir) == step, "it waits for its verdict"
            write_verdict(verdict, step, prune=step == 9)
        assert [process.wait(60) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["status"], result["steps"]) == ("pruned", 9)
    assert result["metrics"]["tokens"] == 9 * 48 * 8
    assert read_checkpoint(checkpoint_path(run_dir / "checkpoints", 9))["step"] == 9


def test_a_worker_that_does_not_answer_lets_the_run_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "verdict.json"))
    assert not await_verdict(3, seconds=0.05)
    assert "no verdict on step 3" in capsys.readouterr().err
    write_verdict(tmp_path / "verdict.json", 3, prune=True)
    assert await_verdict(3, seconds=0.05)
    assert not await_verdict(6, seconds=0.05)

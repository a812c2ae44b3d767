"""Evaluations forked from a warm process: the results of a fresh one, and as much on their own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from conf.load import parse, to_dict, to_yaml
from conf.measure_schema import EvaluateConfig
from conf.schema import TrainConfig
from sweeps.trials import steps
from sweeps.trials.steps import Interrupted, Steps
from sweeps.trials.warm import EvaluationServer
from tests.sweeps.conftest import ROOT

EVALUATE = """\
import json, os, random, signal, sys, time
from pathlib import Path

name, run_dir = Path(sys.argv[1]).parent.name, Path(sys.argv[1]).parent
with (run_dir / "starts").open("a") as file:
    file.write(f"{os.getpid()}\\n")
starts = len((run_dir / "starts").read_text().splitlines())
print("this is", name)
if name == "fails":
    sys.exit("error: no evaluation today")
if name == "raises":
    raise RuntimeError("a bug")
if name == "crashes" or (name == "is-killed-once" and starts == 1):
    os.kill(os.getpid(), signal.SIGSEGV if name == "crashes" else signal.SIGKILL)
if name == "hangs":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
if name == "sleeps":
    time.sleep(600)
result = {"status": "completed", "drawn": random.random(), "session": os.getsid(0) == os.getpid()}
(run_dir / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EvaluationServer]:
    """A server whose evaluations do what their directory's name says."""
    package = tmp_path / "lightning_modules"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "preload.py").write_text("def keep_loaded(path): ...\n")
    (package / "evaluate.py").write_text(EVALUATE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    one = EvaluationServer()
    monkeypatch.setattr(steps, "evaluation_server", lambda: one)
    monkeypatch.setattr(steps, "STOP_GRACE_SECONDS", 0.5)
    yield one
    one.close()


def run(run_dir: Path, stop_when: str | None = None) -> dict:
    """stop_when: the worker is told to stop once this file is there."""
    config = parse(EvaluateConfig, [{"checkpoint": "-"}])
    stop = (lambda: (run_dir / stop_when).exists()) if stop_when else (lambda: False)
    runner = Steps(threads=1, stop=stop, watch=lambda: None, warm=True)
    return runner.run("evaluate", run_dir, config, [], {})


def pids(run_dir: Path) -> list[int]:
    """Of the evaluations that have begun there."""
    starts = run_dir / "starts"
    return [int(line) for line in starts.read_text().splitlines()] if starts.exists() else []


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_one_evaluation_s_end_is_its_own(server: EvaluationServer, tmp_path: Path) -> None:
    first = run(tmp_path / "works")
    serving = server._process
    for name, words in (
        ("fails", "evaluate: exit status 1: error: no evaluation today"),
        ("raises", "evaluate: exit status 1: .*RuntimeError: a bug"),
        ("crashes", "evaluate: killed by SIGSEGV"),
    ):
        with pytest.raises(steps.TrialFailed, match=words):
            run(tmp_path / name)
    assert len(pids(tmp_path / "crashes")) == 2  # a killed one is continued once
    run(tmp_path / "is-killed-once")
    assert len(pids(tmp_path / "is-killed-once")) == 2
    second = run(tmp_path / "works-too")
    assert server._process is serving
    assert first["session"]
    assert second["session"]
    assert first["drawn"] != second["drawn"]
    log = (tmp_path / "works-too" / "log.txt").read_text().splitlines()
    config = tmp_path / "works-too" / "config.yaml"
    assert log == [
        f"$ python -m lightning_modules.evaluate {config} run_dir={config.parent}",
        "this is works-too",
    ]


@pytest.mark.parametrize("name", ["sleeps", "hangs"])
def test_a_worker_told_to_stop_ends_its_evaluation_and_no_more(
    server: EvaluationServer, tmp_path: Path, name: str
) -> None:
    run(tmp_path / "works")
    serving = server._process
    with pytest.raises(Interrupted):
        run(tmp_path / name, stop_when="starts")
    assert not is_alive(pids(tmp_path / name)[0])
    run(tmp_path / "works-too")
    assert server._process is serving


def test_a_killed_server_takes_its_evaluation_along_and_is_replaced(
    server: EvaluationServer, tmp_path: Path
) -> None:
    run_dir = tmp_path / "works"
    run_dir.mkdir()
    log = run_dir / "log.txt"
    (tmp_path / "sleeps").mkdir()
    line = ["lightning_modules.evaluate", str(tmp_path / "sleeps" / "config.yaml")]
    evaluation = server.start(line, log, "-", dict(os.environ))
    deadline = time.monotonic() + 60
    while not pids(tmp_path / "sleeps"):
        assert evaluation.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert server._process is not None
    server._process.kill()
    assert evaluation.wait(10) == -signal.SIGKILL
    while is_alive(pids(tmp_path / "sleeps")[0]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert run(run_dir)["status"] == "completed"


def test_results_are_those_of_a_fresh_process_to_the_last_bit(tmp_path: Path) -> None:
    import torch

    from lightning_modules.backbone import Mamba2LM
    from lightning_modules.checkpoints import write_checkpoint

    sources = [str(ROOT / "conf" / "train" / "smoke.yaml")]
    trained = parse(TrainConfig, sources)
    torch.manual_seed(0)
    weights = {f"model.{name}": value for name, value in Mamba2LM(trained.model).state_dict().items()}
    contents = {"state_dict": weights, "config": to_dict(trained), "step": 1}
    write_checkpoint(contents, tmp_path / "step=0000001.ckpt")
    settings = {
        "checkpoint": str(tmp_path / "step=0000001.ckpt"),
        "suites": ["passkey", "states"],
        "passkey.lengths": [128, 512],
        "passkey.prompts": 4,
        "passkey.depths": 2,
        "passkey.prompts_per_depth": 2,
        "threads": 2,
        "tracking.enabled": False,
    }
    evaluations = {}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    server = EvaluationServer()
    for name in ("fresh", "first", "second"):
        run_dir = tmp_path / name
        run_dir.mkdir()
        (run_dir / "config.yaml").write_text(to_yaml(parse(EvaluateConfig, [settings])))
        line = ["lightning_modules.evaluate", str(run_dir / "config.yaml"), f"run_dir={run_dir}"]
        if name == "fresh":
            subprocess.run([sys.executable, "-m", *line], env=environment, check=True, capture_output=True)
        else:
            log = run_dir / "log.txt"
            assert server.start(line, log, settings["checkpoint"], environment).wait() == 0, log.read_text()
            assert "Passkey exact match" in log.read_text()
        evaluations[name] = (run_dir / "evaluation.json").read_text()
        result = json.loads((run_dir / "result.json").read_text())["metrics"]
        evaluations[name] += str(
            {key: value for key, value in result.items() if not key.startswith(("speed/", "memory/"))}
        )
    server.close()
    assert evaluations["first"] == evaluations["fresh"]
    assert evaluations["second"] == evaluations["fresh"]

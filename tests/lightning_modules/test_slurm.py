"""What a run notes of the SLURM jobs that it went through, and how it asks for the next."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from lightning_modules.checkpoints import list_checkpoints
from lightning_modules.slurm import REQUEUE_FILE, environment_for_child, is_rank, record_start
from lightning_modules.termination import Terminated, Termination
from tests.lightning_modules.launcher import start_train, wait_until
from tests.lightning_modules.test_resume import SETTINGS


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def test_every_start_is_in_the_chain_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert record_start(tmp_path) == {}
    assert not (tmp_path / "slurm.json").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert record_start(tmp_path) == {"slurm_job_id": "17", "slurm_restart_count": "0"}
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    for _ in range(2):  # opened twice by one start
        assert record_start(tmp_path)["slurm_restart_count"] == "2"
    monkeypatch.setenv("SLURM_JOB_ID", "25")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "23")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert record_start(tmp_path) == {"slurm_job_id": "23_4", "slurm_restart_count": "0"}
    starts = json.loads((tmp_path / "slurm.json").read_text())
    assert [(s["job_id"], s["restart_count"]) for s in starts] == [("17", 0), ("17", 2), ("23_4", 0)]


def test_a_trial_that_a_rank_starts_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_rank()
    ours = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}
    for name, value in (ours | {REQUEUE_FILE: "requeue"}).items():
        monkeypatch.setenv(name, value)
    assert is_rank()
    child = environment_for_child()
    assert child["SLURM_JOB_ID"] == "1"
    assert not {"SLURM_PROCID", "SLURM_STEP_ID", "SLURM_NTASKS", REQUEUE_FILE} & child.keys()


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM], ids=["usr1", "sigterm"])
def test_a_run_ended_by_a_signal_asks_its_batch_script_for_a_requeue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    run_dir, output, asked = tmp_path / "run", tmp_path / "output.txt", tmp_path / "requeue"
    argv = [*SETTINGS, "trainer.max_steps=100000", "trainer.checkpoint_every=100000"]
    argv += ["tracking.enabled=false", f"run_dir={run_dir}"]
    process = start_train(argv, output, **{REQUEUE_FILE: str(asked)})
    assert wait_until((run_dir / "metrics.jsonl").exists, process)
    assert process.pid is not None
    for _ in range(3):  # a batch system repeats itself: nothing is cut short
        os.kill(process.pid, signum)
    process.join()
    assert process.exitcode == 0, output.read_text()
    assert "its job is to be requeued and continues it" in output.read_text()
    assert asked.exists()
    assert len(list_checkpoints(run_dir / "checkpoints")) == 1


def test_only_a_second_ctrl_c_is_obeyed_at_once() -> None:
    with Termination() as termination:
        termination.deferred = True
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), signum)
        assert termination.signum == signal.SIGTERM
        with pytest.raises(Terminated) as end:
            os.kill(os.getpid(), signal.SIGINT)
        assert end.value.code == 128 + signal.SIGINT


def test_a_signal_during_the_orderly_end_does_not_break_it() -> None:
    with Termination() as termination:
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)  # what ends an allocation
        assert termination.signum == signal.SIGTERM


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before = signal.getsignal(signal.SIGUSR1)

    def work() -> None:
        with Termination():
            time.sleep(0)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGUSR1) == before

"""A preflight names what is wrong in one sentence, and passes where nothing is."""

import fcntl
import os
import socket
from pathlib import Path

import pytest

from conf.preflight import PreflightConfig
from conf.schema import TrackingConfig, TrainerConfig
from sweeps.preflight import is_sweep, main, read_subject
from sweeps.readiness import checks

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "conf" / "train" / "smoke.yaml")
SWEEP = str(ROOT / "conf" / "sweep" / "smoke.yaml")


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MASTER_"))]:
        monkeypatch.delenv(name)


def test_everything_holds_for_two_ranks_and_a_line_says_so_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [SMOKE, "trainer.devices=2", "trainer.accelerator=cpu", f"run_dir={tmp_path}/run"]
    assert main([*argv, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", "free_gib=0.001"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = "versions directory locks tracking caches ranks port all-reduce"
    assert [line.split()[:2] for line in lines] == [["ok", name] for name in names.split()]
    assert "gloo over 2 ranks on 1 nodes" in lines[-1]
    assert list((tmp_path / "run").iterdir()) == []


def test_every_failure_is_a_line_and_the_first_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(checks, "check_all_reduce", lambda *_: "not here")
    argv = [SWEEP, f"study_dir={tmp_path}/study", "tracking.uri=http://127.0.0.1:9", "free_gib=1e9"]
    assert main(argv) == 1
    output = capsys.readouterr()
    failed = [line.split()[1] for line in output.out.splitlines() if line.startswith("FAIL")]
    assert failed == ["directory", "tracking"]
    assert "the journal answers; 0 studies" in output.out
    (error,) = output.err.splitlines()
    assert error.startswith(f"error: preflight: {tmp_path}/study: ")
    assert error.endswith("free_gib=1e+09 asked for: make room there")


def test_a_config_that_does_not_hold_is_refused_before_anything_is_looked_at(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        main([SMOKE, "trainer.max_step=3"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: trainer.max_step: ")


def test_sweeps_and_trainings_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert not is_sweep([])
    assert not is_sweep([SMOKE, "seed=1"])
    assert read_subject([SMOKE, "run_dir=there"]).directory == "there"
    subject = read_subject([SWEEP, "study_dir=elsewhere"])
    assert subject.directory == "elsewhere"
    assert subject.sweep is not None


def test_a_requirement_that_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\ndependencies = ["torch>=2", "numpy>=99"]\n')
    with pytest.raises(ValueError, match=r"numpy [\d.]+: needs >=99: make setup"):
        checks.check_versions()
    project.write_text('[project]\ndependencies = ["no-such-package-here"]\n')
    with pytest.raises(ValueError, match="no-such-package-here is not installed"):
        checks.check_versions()


def test_locks_that_exclude_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_locks(tmp_path) == "flock excludes other processes"
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # as file systems without locks have it
    with pytest.raises(ValueError, match="its file locks do not exclude other processes"):
        checks.check_locks(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_sqlite_and_triton_on_a_network_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "file_system", lambda path: "nfs4")
    with pytest.raises(ValueError, match=r"SQLite corrupts on nfs4: .* tracking.uri=http://HOST:5000"):
        checks.check_tracking(TrackingConfig())
    monkeypatch.setattr(checks, "is_rank", lambda: True)
    with pytest.raises(ValueError, match=r"TRITON_CACHE_DIR=.*: on nfs4 the caches"):
        checks.check_caches()


def test_file_systems_are_read_from_the_longest_mount_point(tmp_path: Path) -> None:
    assert checks.file_system(Path("/proc/self/not/there")) == "proc"
    assert checks.file_system(tmp_path) == checks.file_system(tmp_path / "not" / "there")


def test_a_port_in_use_and_a_host_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ValueError, match=f"MASTER_PORT={port}: Address already in use on "):
            checks.check_port()
    assert checks.check_port() == f"localhost is 127.0.0.1, {port} is free"
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    with pytest.raises(ValueError, match=r"MASTER_ADDR=nowhere.invalid: .* cannot resolve it"):
        checks.check_port()


def test_tasks_of_srun_that_are_not_the_configs_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "2"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    assert checks.check_ranks(TrainerConfig(num_nodes=2)) == "2 tasks of srun on 2 nodes"
    with pytest.raises(ValueError, match="srun has started 2 tasks on 2 nodes"):
        checks.check_ranks(TrainerConfig(num_nodes=2, devices=4))
    with pytest.raises(ValueError, match="MASTER_ADDR, MASTER_PORT: not set"):
        checks.check_port()


def test_a_rank_that_never_comes_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of two tasks of srun, alone."""
    step = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}
    for name, value in (step | checks._own_rendezvous()).items():
        monkeypatch.setenv(name, value)
    config = TrainerConfig(accelerator="cpu", num_nodes=2)
    subject = checks.Subject(directory=str(tmp_path), tracking=TrackingConfig(), trainer=config)
    with pytest.raises(ValueError, match="all-reduce over 2 ranks: nothing within timeout_seconds=3"):
        checks.check_all_reduce(subject, timeout=3)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="timeout_seconds=0: must be positive"):
        PreflightConfig(timeout_seconds=0)

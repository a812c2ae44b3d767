"""One directory, one run, one writer."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from conf.schema import ModelConfig, TrackingConfig, TrainConfig, TrainerConfig
from lightning_modules.run_dir import (
    config_hash,
    is_rank_zero,
    locate,
    open_run_dir,
    read_result,
    require_same_config,
    write_text,
)
from tests.lightning_modules.launcher import start, wait_until


def test_the_same_config_finds_the_same_directory() -> None:
    config = TrainConfig()
    path = locate(config, ["conf/train/demo.yaml", "seed=0"])
    assert path == Path("runs") / f"demo-{config_hash(config)}"
    assert locate(config, []) == Path("runs") / f"train-{config_hash(config)}"
    moved = replace(config, run_dir="x", tracking=TrackingConfig(enabled=False))
    assert config_hash(moved) == config_hash(config)
    assert config_hash(replace(config, seed=1)) != config_hash(config)
    assert locate(moved, []) == Path("x")


def test_a_run_directorys_config_means_that_run(tmp_path: Path) -> None:
    config = TrainConfig(run_dir=str(tmp_path / "run"))
    open_run_dir(tmp_path / "run", config).close()
    (tmp_path / "run").rename(tmp_path / "moved")
    file = str(tmp_path / "moved" / "config.yaml")
    assert locate(replace(config, run_dir=None), [file]) == tmp_path / "moved"
    assert locate(replace(config, run_dir="other"), [file]) == Path("other")


def test_another_config_is_refused_and_the_setting_named(tmp_path: Path) -> None:
    config = TrainConfig()
    other = replace(config, model=ModelConfig(d_state=32))
    open_run_dir(tmp_path, other).close()  # a run that never began leaves its directory free
    open_run_dir(tmp_path, config).close()
    (tmp_path / "checkpoints" / "step=0000001.ckpt").touch()
    require_same_config(tmp_path, config)
    with pytest.raises(ValueError, match=r"model.d_state=64, this one has model.d_state=32"):
        open_run_dir(tmp_path, other)
    # What only says where and how fast may change.
    faster = replace(
        config, trainer=TrainerConfig(threads=1, checkpoint_every=7), tracking=TrackingConfig(uri="x")
    )
    require_same_config(tmp_path, faster)


def test_a_second_writer_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    run = open_run_dir(tmp_path, TrainConfig())
    with pytest.raises(ValueError, match=rf"another process \(pid {os.getpid()} on .*\) is writing it"):
        open_run_dir(tmp_path, TrainConfig())
    run.close()
    open_run_dir(tmp_path, TrainConfig()).close()


def hold_with_child(path: str) -> None:
    """Lock a run directory, fork a child that outlives this process, and wait to be killed."""
    import time

    run = open_run_dir(Path(path), TrainConfig())
    if os.fork() == 0:
        time.sleep(3)
        os._exit(0)
    (Path(path) / "ready").touch()
    time.sleep(60)
    run.close()


def test_the_lock_goes_with_a_killed_process_even_if_its_data_workers_live(tmp_path: Path) -> None:
    process = start(hold_with_child, str(tmp_path), output=tmp_path / "output.txt")
    assert wait_until((tmp_path / "ready").exists, process)
    with pytest.raises(ValueError, match="another process"):
        open_run_dir(tmp_path, TrainConfig())
    process.kill()
    process.join()
    open_run_dir(tmp_path, TrainConfig()).close()


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"run_dir=.*/file/run: cannot be written \(Not a directory\)"):
        open_run_dir(tmp_path / "file" / "run", TrainConfig())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(ValueError, match=r"cannot be written \(Permission denied\)"):
        open_run_dir(tmp_path, TrainConfig())


def test_a_read_only_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_run_dir(tmp_path, TrainConfig()).close()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"run_dir=.*: cannot be written"):
        open_run_dir(tmp_path, TrainConfig())


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    assert read_result(tmp_path) is None
    (tmp_path / "result.json").write_text('{"status": ')
    with pytest.raises(ValueError, match=r"result.json: not valid JSON"):
        read_result(tmp_path)


def test_files_are_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_text(file, "old")

    def die_before_renaming(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die_before_renaming)
    with pytest.raises(KeyboardInterrupt):
        write_text(file, "new")
    assert file.read_text() == "old"


def test_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert is_rank_zero()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not is_rank_zero()
    monkeypatch.setenv("RANK", "0")
    assert is_rank_zero()

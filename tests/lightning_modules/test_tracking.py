"""MLflow holds each point once, whatever happens to the process or the store."""

import json
import shutil
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure

from conf.schema import TrackingConfig
from lightning_modules import tracking
from lightning_modules.metrics_file import MetricsFile
from lightning_modules.mlflow_store import connect, open_store, sqlite_path
from lightning_modules.termination import Terminated
from lightning_modules.tracking import Tracker
from tests.lightning_modules.launcher import start

matplotlib.use("Agg")


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables: making them takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(tmp_path: Path, empty_database: Path) -> TrackingConfig:
    """A store of its own."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="tests")


def make_tracker(store: TrackingConfig, run_dir: Path, **more: Any) -> Tracker:
    run_dir.mkdir(exist_ok=True)
    return Tracker(store, run_dir, name="a run", **more)


def read_run(store: TrackingConfig, tracker: Tracker) -> Any:
    assert tracker.run_id is not None
    return connect(store.uri).get_run(tracker.run_id)


def read_points(store: TrackingConfig, tracker: Tracker, key: str) -> list[tuple[int, float]]:
    assert tracker.run_id is not None
    return [(m.step, m.value) for m in connect(store.uri).get_metric_history(tracker.run_id, key)]


def test_a_run_says_what_it_is(store: TrackingConfig, tmp_path: Path) -> None:
    store.parent_run_id, store.tags = "0123", {"study": "s"}
    params = {f"section.field{i}": i for i in range(150)}
    with make_tracker(store, tmp_path / "run", params=params, tags={"seed": "3"}) as tracker:
        tracker.log_metrics({"loss": 2.0, "exact": 0.5}, step=10)
    run = read_run(store, tracker)
    assert run.info.status == "FINISHED"
    assert run.data.params == {name: str(value) for name, value in params.items()}
    assert run.data.metrics == {"loss": 2.0, "exact": 0.5}
    expected = {
        "mlflow.runName": "a run",
        "mlflow.parentRunId": "0123",
        "study": "s",
        "seed": "3",
        "host": socket.gethostname(),
        "run_dir": str(tmp_path / "run"),
    }
    assert expected.items() <= run.data.tags.items()
    commit = tracking.git_tags()
    assert commit.items() <= run.data.tags.items()
    assert tracker.complete
    experiment = connect(store.uri).get_experiment_by_name("tests")
    assert experiment.artifact_location == str(tmp_path / "artifacts" / "tests")


def test_figures_tables_and_files_become_artifacts(store: TrackingConfig, tmp_path: Path) -> None:
    with make_tracker(store, tmp_path / "run") as tracker:
        figure = Figure()
        figure.subplots().plot([1, 2])
        assert tracker.log_figure(figure, "plot.png").read_bytes().startswith(b"\x89PNG")
        tracker.log_table({"length": [256, 512], "exact": [1.0, 0.5]}, "recall.json")
        tracker.log_artifact(tmp_path / "run" / "tracking.json", "notes")
    folder = tmp_path / "artifacts" / "tests" / str(tracker.run_id) / "artifacts"
    assert {str(p.relative_to(folder)) for p in folder.rglob("*.*")} == {
        "plot.png",
        "recall.json",
        "notes/tracking.json",
    }
    assert json.loads((folder / "recall.json").read_text()) == {
        "columns": ["length", "exact"],
        "data": [[256, 1.0], [512, 0.5]],
    }


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Terminated(15), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
        (ValueError(), "FAILED"),
        (SystemExit(1), "FAILED"),
    ],
    ids=["sigterm", "ctrl-c", "error", "exit"],
)
def test_the_status_is_honest(
    store: TrackingConfig, tmp_path: Path, error: BaseException, status: str
) -> None:
    tracker = make_tracker(store, tmp_path / "run")
    with pytest.raises(type(error)), tracker:
        raise error
    assert read_run(store, tracker).info.status == status
    with make_tracker(store, tmp_path / "run") as again:
        assert again.run_id == tracker.run_id
        assert read_run(store, again).info.status == "RUNNING"
    assert read_run(store, again).info.status == "FINISHED"


def test_points_computed_again_after_a_kill_are_not_doubled(store: TrackingConfig, tmp_path: Path) -> None:
    killed = make_tracker(store, tmp_path / "run")
    killed.__enter__()
    for step in range(10):
        killed.log_metrics({"loss": step / 2}, step)
        if step == 6:
            assert killed.flush(force=True)
    # Killed: points 7 to 9 never left the process, the file has them.
    with make_tracker(store, tmp_path / "run") as tracker:
        for step in range(4, 20):
            tracker.log_metrics({"loss": step / 2}, step)
    assert read_points(store, tracker, "loss") == [(step, step / 2) for step in range(20)]


def test_points_in_the_store_are_not_doubled_when_the_file_is_gone(
    store: TrackingConfig, tmp_path: Path
) -> None:
    with make_tracker(store, tmp_path / "run") as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with make_tracker(store, tmp_path / "run") as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
        tracker.log_metrics({"loss": 2.0}, 2)
    assert read_points(store, tracker, "loss") == [(1, 1.0), (2, 2.0)]
    assert MetricsFile(tmp_path / "run" / "metrics.jsonl").seen == {("loss", 1), ("loss", 2)}


def test_a_process_killed_before_it_noted_its_run_finds_it_again(
    store: TrackingConfig, tmp_path: Path
) -> None:
    killed = make_tracker(store, tmp_path / "run", params={"a": 1})
    killed.__enter__()
    file = tmp_path / "run" / "tracking.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "run_id": None}))
    with make_tracker(store, tmp_path / "run", params={"a": 2, "b": 3}) as tracker:
        assert tracker.run_id == killed.run_id
    # Params cannot change; a new one is added.
    assert read_run(store, tracker).data.params == {"a": "1", "b": "3"}


def test_another_store_gets_a_new_run_with_all_points(
    store: TrackingConfig, tmp_path: Path, empty_database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with make_tracker(store, tmp_path / "run") as first:
        first.log_metrics({"loss": 1.0}, 1)
    shutil.copy(empty_database, tmp_path / "other.db")
    store.uri = f"sqlite:///{tmp_path}/other.db"
    with make_tracker(store, tmp_path / "run") as tracker:
        tracker.log_metrics({"loss": 2.0}, 2)
    assert tracker.run_id != first.run_id
    assert read_points(store, tracker, "loss") == [(1, 1.0), (2, 2.0)]
    assert f"MLflow has no run {first.run_id} any more" in capsys.readouterr().err


@contextmanager
def full_disk(store: TrackingConfig) -> Iterator[None]:
    """Within the block, the store answers every write as a full disk would."""
    writes = ("INSERT ON metrics", "INSERT ON latest_metrics", "UPDATE ON runs")
    with closing(sqlite3.connect(str(sqlite_path(store.uri)))) as database:
        for i, write in enumerate(writes):
            database.execute(
                f"CREATE TRIGGER full{i} BEFORE {write} BEGIN SELECT RAISE(FAIL, 'disk is full'); END"
            )
    yield
    with closing(sqlite3.connect(str(sqlite_path(store.uri)))) as database:
        for i in range(len(writes)):
            database.execute(f"DROP TRIGGER full{i}")


def test_work_does_not_wait_for_a_slow_store(store: TrackingConfig, tmp_path: Path) -> None:
    """10,000 points: the thread that trains hands them over, whatever time the store takes."""
    tracker = make_tracker(store, tmp_path / "run")
    longest = 0.0
    with tracker:
        assert tracker.client is not None
        log_batch = tracker.client.log_batch

        def slow(*args: Any, **kwargs: Any) -> None:
            time.sleep(0.2)
            log_batch(*args, **kwargs)

        tracker.client.log_batch = slow  # type: ignore[method-assign]
        for step in range(1000):
            began = time.perf_counter()
            tracker.log_metrics({f"key{key}": float(step + key) for key in range(10)}, step)
            longest = max(longest, time.perf_counter() - began)
    assert tracker.complete
    assert longest < 0.2
    for key in (0, 9):
        expected = [(step, float(step + key)) for step in range(1000)]
        assert read_points(store, tracker, f"key{key}") == expected


def test_a_full_store_costs_one_warning_and_no_point(
    store: TrackingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = make_tracker(store, tmp_path / "run")
    with tracker:
        tracker.log_metrics({"loss": 0.0}, 0)
        with full_disk(store):
            for step in range(1, 4):
                tracker.log_metrics({"loss": float(step)}, step)
                assert not tracker.flush(force=True)
        tracker.log_metrics({"loss": 4.0}, 4)
    assert tracker.complete
    assert read_points(store, tracker, "loss") == [(step, float(step)) for step in range(5)]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert "disk is full" in warnings[0]


def test_a_store_that_stays_full_leaves_its_points_to_the_next_start(
    store: TrackingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking.time, "sleep", lambda seconds: None)
    tracker = make_tracker(store, tmp_path / "run")
    tracker.__enter__()
    tracker.log_metrics({"loss": 0.0}, 0)
    with full_disk(store):
        tracker.close("FINISHED")
    assert not tracker.complete
    assert "1 metric points are in" in capsys.readouterr().err
    with make_tracker(store, tmp_path / "run") as tracker:
        pass
    assert tracker.complete
    assert read_points(store, tracker, "loss") == [(0, 0.0)]
    assert read_run(store, tracker).info.status == "FINISHED"


def test_a_failing_store_is_not_asked_at_every_point(store: TrackingConfig, tmp_path: Path) -> None:
    calls = []
    with make_tracker(store, tmp_path / "run") as tracker:
        tracker._attempt = lambda call: calls.append(1) or False  # type: ignore[method-assign]
        for step in range(1000):
            tracker.log_metrics({"loss": 1.0}, step)
        assert len(calls) == 1
        del tracker._attempt
    assert len(read_points(store, tracker, "loss")) == 1000


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("sqlite:///{path}/garbage.db", "not a database"),
        ("sqlite:///{path}/garbage.db/mlflow.db", "Not a directory|File exists"),
        ("http://127.0.0.1:{port}", "Connection refused"),
        ("nonsense://x", "nonsense"),
    ],
    ids=["garbage", "no-directory", "no-server", "no-such-store"],
)
def test_a_store_that_does_not_answer_is_refused_at_the_start(tmp_path: Path, uri: str, reason: str) -> None:
    (tmp_path / "garbage.db").write_text("this is no database" * 100)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = TrackingConfig(uri=uri.format(path=tmp_path, port=port))
    with pytest.raises(ValueError, match=rf"\Atracking.uri=[^\n]*({reason})[^\n]*enabled=false\Z"):
        make_tracker(config, tmp_path / "run").__enter__()


def test_a_locked_store_is_refused_at_the_start(
    store: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_modules.mlflow_store.REACH_SECONDS", 0.1)
    lock = sqlite3.connect(tmp_path / "mlflow.db")
    lock.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ValueError, match=r"cannot be opened \(database is locked\)"):
        make_tracker(store, tmp_path / "run").__enter__()
    lock.close()


def test_a_deleted_experiment_is_refused(store: TrackingConfig, tmp_path: Path) -> None:
    client, experiment_id = open_store(store)
    client.delete_experiment(experiment_id)
    with pytest.raises(ValueError, match="experiment tests is deleted: restore it"):
        make_tracker(store, tmp_path / "run").__enter__()


def test_without_tracking_the_file_holds_all(tmp_path: Path) -> None:
    with make_tracker(TrackingConfig(enabled=False), tmp_path / "run") as tracker:
        tracker.log_metrics({"loss": 1.5, "val/loss": 2.5}, 10)
        tracker.log_table({"a": [1]}, "a.json")
    assert tracker.run_id is None
    points = MetricsFile(tmp_path / "run" / "metrics.jsonl").points
    assert [(p.key, p.value, p.step) for p in points] == [("loss", 1.5, 10), ("val/loss", 2.5, 10)]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_a_line_cut_short_is_dropped_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in (1, 2):
        file.write(file.add({"loss": step}, step))
    path.write_bytes(path.read_bytes()[:-5])
    again = MetricsFile(path)
    assert again.seen == {("loss", 1)}
    again.write(again.add({"loss": 2}, 2))
    assert [p.value for p in MetricsFile(path).points] == [1, 2]


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write(file.add({"loss": 1}, 1))
    size = path.stat().st_size
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limit[1]))
    try:
        with pytest.raises(OSError, match=r"No space left|File too large"):
            file.write(file.add({"loss": 2}, 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.stat().st_size == size


def log_one_run(uri: str, run_dir: str) -> None:
    with make_tracker(TrackingConfig(uri=uri), Path(run_dir)) as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)


def test_many_processes_may_find_the_store_empty(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    processes = [
        start(log_one_run, uri, str(tmp_path / f"run{i}"), output=tmp_path / f"{i}.txt") for i in range(4)
    ]
    for i, process in enumerate(processes):
        process.join()
        assert process.exitcode == 0, (tmp_path / f"{i}.txt").read_text()
    client = connect(uri)
    experiment = client.get_experiment_by_name("longstate")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 4


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("sqlite:///runs/mlflow.db", Path.cwd() / "runs/mlflow.db"),
        ("sqlite:////data/mlflow.db?timeout=60", Path("/data/mlflow.db")),
        ("http://127.0.0.1:5000", None),
        ("postgresql+psycopg://user@host/db", None),
    ],
)
def test_sqlite_paths(uri: str, path: Path | None) -> None:
    assert sqlite_path(uri) == path

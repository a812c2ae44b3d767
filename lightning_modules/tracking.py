"""One MLflow run: params once, metrics by step, figures, tables, an honest status.

The store must answer when a run starts; after that it never stops the work. A store that fails later (full,
locked, gone) costs one warning; points stay in run_dir/metrics.jsonl and are sent when it answers again, at
the latest by starting the same command again. Each (key, step) reaches MLflow once, over any number of kills.
Points are sent by a thread beside the work, which never waits for a store.

    with Tracker(config.tracking, run_dir, name="...", params=flatten(config)) as tracker:
        tracker.log_metrics({"val/loss": 1.2}, step=100)
        tracker.log_figure(figure, "recall.png")
        tracker.log_table({"length": [256, 512], "exact": [1.0, 0.5]}, "recall.json")

leaves the run FINISHED, KILLED (a signal, Ctrl-C), FAILED (any other exception) or what the exception says.
Its tag slurm_chain lists every cluster job that the run has passed through.
"""

import json
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from conf.schema import TrackingConfig
from lightning_modules.job import JOBS_TAG, chain, job_name
from lightning_modules.metrics_file import MetricsFile, Point
from lightning_modules.mlflow_store import one_line, open_store
from lightning_modules.run_dir import is_rank_zero, write_json
from lightning_modules.slurm import record_start
from lightning_modules.termination import Terminated

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.tracking.client import MlflowClient

FLUSH_POINTS = 1000
FLUSH_SECONDS = 5.0
RETRY_SECONDS = 30.0  # after a failure; doubles each time
LAST_ATTEMPTS = 3  # when the run ends
KEY_TAG = "longstate.key"  # finds the run of a process killed before it could note the run's id


class Tracker:
    """Records a run in MLflow and run_dir/metrics.jsonl; with tracking.enabled=false, in the latter only."""

    def __init__(
        self,
        config: TrackingConfig,
        run_dir: Path,
        *,
        name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self.config, self.run_dir, self.name = config, run_dir, name
        self.params, self.tags = dict(params or {}), dict(tags or {})
        self.run_id: str | None = None
        self.client: MlflowClient | None = None
        self.metrics = MetricsFile(run_dir / "metrics.jsonl")
        self._pending: list[Point] = []  # added to at its end here, taken from its beginning by the sender
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="tracker")
        self._sending: Future[bool] | None = None
        self._flushing = threading.Lock()
        self._held: set[tuple[str, int]] = set()  # what MLflow had when this process started
        self._flushed_at = time.monotonic()
        self._retry_at, self._retry_seconds = 0.0, RETRY_SECONDS
        self._warned = False
        self.active = is_rank_zero()  # other ranks record nothing
        self.final_status = "FINISHED"  # of a run that ends without an exception
        self.complete = False  # closed, and MLflow holds everything

    def __enter__(self) -> Self:
        """Open the store and the run. Raises ValueError (one line) if the store does not answer."""
        if self.active:
            self.tags |= record_start(self.run_dir)
        if self.config.enabled and self.active:
            self.client, experiment_id = open_store(self.config)
            self._open_run(experiment_id)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            status = self.final_status
        else:
            status = "KILLED" if issubclass(kind, Terminated | KeyboardInterrupt) else "FAILED"
            status = getattr(kind, "run_status", status)
        self.close(status)

    def take_over(self, client: "MlflowClient", run: Any) -> None:
        """In place of `__enter__`: fill a run that the caller has made with params and the points on disk."""
        self.client, self.run_id = client, run.info.run_id
        self._log_params(run)
        self._take_up(run)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values at `step`. A (key, step) that the run holds already is left as it is."""
        if not self.active:
            return
        fresh = self.metrics.add(dict(metrics), step)
        try:
            self.metrics.write(fresh)
        except OSError as error:
            self._warn(f"{self.metrics.path}: cannot be written ({error.strerror})")
        if self.client is not None:
            self._pending.extend(point for point in fresh if (point.key, point.step) not in self._held)
            is_due = len(self._pending) >= FLUSH_POINTS or time.monotonic() - self._flushed_at > FLUSH_SECONDS
            if is_due and (self._sending is None or self._sending.done()):
                self._sending = self._sender.submit(self.flush)

    def log_figure(self, figure: "Figure", name: str) -> Path:
        """Save a matplotlib figure as run_dir/name (.png) and in MLflow."""
        path = self.run_dir / name
        figure.savefig(path)
        self.log_artifact(path)
        return path

    def log_table(self, columns: Mapping[str, list[Any]], name: str) -> None:
        """Record columns of equal length as an MLflow table; `name` ends in .json."""
        self._attempt(lambda client, run_id: client.log_table(run_id, dict(columns), name))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file into the run's artifacts."""
        self._attempt(lambda client, run_id: client.log_artifact(run_id, str(path), folder))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        entities = [RunTag(key, str(value)) for key, value in tags.items()]
        self._attempt(lambda client, run_id: client.log_batch(run_id, tags=entities))

    def flush(self, force: bool = False) -> bool:
        """Send what is pending; True if nothing is left. After a failure, waits its time unless forced."""
        with self._flushing:
            return self._flush(force)

    def _flush(self, force: bool) -> bool:
        if self.client is None or not self._pending:
            return True
        if not force and time.monotonic() < self._retry_at:
            return False
        from mlflow.entities import Metric

        self._flushed_at = time.monotonic()
        while self._pending:
            batch = self._pending[:1000]
            entities = [Metric(p.key, p.value, p.time, p.step) for p in batch]
            if not self._attempt(lambda client, run_id, m=entities: client.log_batch(run_id, metrics=m)):
                self._retry_at = time.monotonic() + self._retry_seconds
                self._retry_seconds *= 2
                return False
            del self._pending[: len(batch)]
        self._retry_seconds = RETRY_SECONDS
        return True

    def close(self, status: str) -> None:
        """Send the rest and set the run's status; sets `complete` if MLflow has everything then."""
        self._sender.shutdown()
        self.complete = self.client is None
        if self.complete:
            return
        for attempt in range(LAST_ATTEMPTS):
            if self.flush(force=True) and self._attempt(lambda c, run_id: c.set_terminated(run_id, status)):
                self.client, self.complete = None, True
                return
            time.sleep(attempt)
        print(
            f"warning: {len(self._pending)} metric points are in {self.metrics.path} only: "
            "start the same command again to send them",
            file=sys.stderr,
        )
        self.client = None

    def _open_run(self, experiment_id: str) -> None:
        """Continue the run that tracking.json names, or create one; then send what MLflow lacks."""
        file = self.run_dir / "tracking.json"
        noted = json.loads(file.read_text()) if file.is_file() else {}
        key = noted.get("key") or uuid.uuid4().hex
        try:
            run = self._find_run(noted, experiment_id, key)
            if run is None:
                write_json(file, {"key": key, "run_id": None})
                tags = {"mlflow.runName": self.name, KEY_TAG: key}
                if self.config.parent_run_id:
                    tags["mlflow.parentRunId"] = self.config.parent_run_id
                run = self._client().create_run(experiment_id, tags=tags)
            self.run_id = run.info.run_id
            write_json(file, {"key": key, "run_id": self.run_id})
            self._describe(run)
            self._take_up(run)
        except Exception as error:
            raise ValueError(
                f"tracking.uri={self.config.uri}: cannot start a run ({one_line(error)})"
            ) from None

    def _find_run(self, noted: dict[str, Any], experiment_id: str, key: str) -> Any:
        """The run of an earlier start of this run directory, if the store has it."""
        if not noted:
            return None
        found = self._client().search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        if not found and noted["run_id"]:
            print(
                f"MLflow has no run {noted['run_id']} any more: {self.config.uri} gets a new one",
                file=sys.stderr,
            )
        return found[0] if found else None

    def _describe(self, run: Any) -> None:
        """Status, params and tags."""
        from mlflow.entities import RunTag

        client = self._client()
        if run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
        self._log_params(run)
        jobs = chain(run.data.tags.get(JOBS_TAG, ""), job_name())
        tags = {
            "host": socket.gethostname(),
            "run_dir": str(self.run_dir.absolute()),
            **git_tags(),
            **({JOBS_TAG: jobs} if jobs else {}),
            **self.tags,
            **self.config.tags,
        }
        client.log_batch(run.info.run_id, tags=[RunTag(k, str(v)) for k, v in tags.items()])

    def _log_params(self, run: Any) -> None:
        """Those that the run lacks: they cannot change."""
        from mlflow.entities import Param

        missing = [Param(k, str(v)) for k, v in self.params.items() if k not in run.data.params]
        for i in range(0, len(missing), 100):
            self._client().log_batch(run.info.run_id, params=missing[i : i + 100])

    def _take_up(self, run: Any) -> None:
        """Compare with MLflow point by point: a kill may have come between any two writes."""
        self._held = {
            (metric.key, metric.step)
            for key in run.data.metrics
            for metric in self._client().get_metric_history(run.info.run_id, key)
        }
        self._pending = [p for p in self.metrics.points if (p.key, p.step) not in self._held]
        self.flush()

    def _client(self) -> "MlflowClient":
        assert self.client is not None
        return self.client

    def _attempt(self, call: Callable[..., Any]) -> bool:
        """Whether `call(client, run_id)` succeeded: the store's failure is never the run's."""
        if self.client is None:
            return True
        try:
            call(self.client, self.run_id)
        except Exception as error:
            self._warn(f"tracking.uri={self.config.uri}: {one_line(error)}")
            return False
        return True

    def _warn(self, problem: str) -> None:
        if not self._warned:
            print(f"warning: {problem}; going on, and trying again later", file=sys.stderr)
        self._warned = True


def git_tags() -> dict[str, str]:
    """Commit of this source tree and whether tracked files differ from it; empty outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"mlflow.source.git.commit": commit, "git_dirty": str(dirty).lower()}

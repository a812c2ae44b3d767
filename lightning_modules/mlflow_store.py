"""Opening the MLflow store: quickly refused if it cannot work, safe when many processes find it empty."""

import contextlib
import fcntl
import logging
import os
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from conf.schema import TrackingConfig
from lightning_modules.imports import UNUSED_BY_MLFLOW, heavy_imports

if TYPE_CHECKING:
    from mlflow.tracking.client import MlflowClient

# Read by MLflow on import. No telemetry; a server that is down must not stop training for minutes.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "GIT_PYTHON_REFRESH": "quiet",
}
REACH_SECONDS = 10


def open_store(config: TrackingConfig) -> tuple["MlflowClient", str]:
    """A client and the id of the experiment, created where needed.

    Raises ValueError (one line) if the store cannot be reached and written now.
    """
    try:
        with _first_comer_lock(config.uri):
            _require_reachable(config.uri)
            client = connect(config.uri)
            return client, _experiment_id(client, config)
    except Exception as error:
        raise ValueError(
            f"tracking.uri={config.uri}: cannot be opened ({one_line(error)}): "
            "mend it, choose another, or set tracking.enabled=false"
        ) from None


def connect(uri: str) -> "MlflowClient":
    """MLflow's client, imported here."""
    quieten()
    with heavy_imports(UNUSED_BY_MLFLOW):
        from mlflow.tracking.client import MlflowClient

        client = MlflowClient(tracking_uri=uri)  # imports what its kind of store needs
    return client


def quieten() -> None:
    """Switch off MLflow's chatter: before it is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # Prints a stack for every error that it also raises; we report those in one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def sqlite_path(uri: str) -> Path | None:
    """The database file of a SQLite URI, absolute; None for any other store."""
    scheme, separator, path = uri.partition(":///")
    if not separator or not scheme.startswith("sqlite"):
        return None
    return Path(path.partition("?")[0]).absolute()


def one_line(error: Exception) -> str:
    """The first line of an error that says something, SQL statements and stack left out."""
    lines = [line for line in str(error).split("\n") if line.strip() and not line.startswith("(raised as")]
    return (lines[0] if lines else type(error).__name__)[:200]


def no_such_run(error: Exception) -> bool:
    """Whether the store has answered that it does not know a run."""
    return getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST"


def _experiment_id(client: "MlflowClient", config: TrackingConfig) -> str:
    experiment = client.get_experiment_by_name(config.experiment)
    if experiment is not None:
        if experiment.lifecycle_stage != "active":
            raise ValueError(
                f"experiment {config.experiment} is deleted: restore it or set tracking.experiment"
            )
        return experiment.experiment_id
    database = sqlite_path(config.uri)
    # MLflow would put artifacts under the working directory of whoever comes first.
    location = None if database is None else str(database.parent / "artifacts" / config.experiment)
    return client.create_experiment(config.experiment, artifact_location=location)


@contextlib.contextmanager
def _first_comer_lock(uri: str) -> Iterator[None]:
    """One process at a time creates the tables of a fresh SQLite database: MLflow's migrations race."""
    database = sqlite_path(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{database}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _require_reachable(uri: str) -> None:
    """Fail within seconds where MLflow would retry for minutes."""
    database = sqlite_path(uri)
    if database is not None:
        connection = sqlite3.connect(database, timeout=REACH_SECONDS)
        try:
            # Takes the write lock: a read-only, locked, full or foreign file fails here.
            connection.execute("PRAGMA schema_version")
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
        finally:
            connection.close()
    elif uri.startswith(("http://", "https://")):
        # An HTTP error is an answer: a proxy may refuse /health to a client without credentials.
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=REACH_SECONDS).close()
    else:
        import sqlalchemy

        engine = sqlalchemy.create_engine(uri)
        try:
            engine.connect().close()
        finally:
            engine.dispose()

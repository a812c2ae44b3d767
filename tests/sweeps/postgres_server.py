"""A real PostgreSQL of the tests' own, on a free port of localhost, its files in a temporary directory."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg

INSTALL = "apt-get install -y postgresql"


def binaries() -> Path | None:
    """Where initdb and postgres are; Debian keeps them off the PATH."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    on_path = shutil.which("postgres")
    if on_path and not found:
        found.append(Path(on_path).parent)
    found = [path for path in found if (path / "initdb").exists()]
    return max(found, key=lambda path: path.parent.name) if found else None


class Server:
    """Started with `start`; `kill` is SIGKILL to all of it; `start` again recovers."""

    def __init__(self, folder: Path, bin_dir: Path) -> None:
        self.folder, self.bin_dir = folder, bin_dir
        # Refuses to run as root.
        self.user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
        self.port = _free_port()
        self.process: subprocess.Popen | None = None
        if os.geteuid() == 0:
            shutil.chown(folder, self.user)
        options = ["-A", "trust", "-U", "sweeps", "-N", "--no-locale", "-E", "UTF8"]
        self._run(str(bin_dir / "initdb"), "-D", str(folder / "data"), *options)

    @property
    def admin_url(self) -> str:
        return f"postgresql://sweeps@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        settings = ("listen_addresses=127.0.0.1", "fsync=off", f"unix_socket_directories={self.folder}")
        options = [argument for setting in settings for argument in ("-c", setting)]
        with (self.folder.parent / f"{self.folder.name}.log").open("a") as log:
            postgres = [str(self.bin_dir / "postgres"), "-D", str(self.folder / "data"), "-p", str(self.port)]
            self.process = subprocess.Popen(
                [*self._as_user("--pdeathsig", "INT"), *postgres, *options],  # it ends with the tests
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )
        for _ in range(400):
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(self.admin_url).close()
                return
            assert self.process.poll() is None, Path(log.name).read_text()
            time.sleep(0.05)
        raise AssertionError("PostgreSQL did not start")

    def kill(self) -> None:
        """As if the host had lost power."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children()
        self.process.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.wait()
        self.process = None

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)  # the fast shutdown
            self.process.wait()
            self.process = None

    def make_database(self, name: str) -> str:
        """Create a database; returns its URL."""
        with psycopg.connect(self.admin_url, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')  # type: ignore[call-overload]
        return self.admin_url.replace("/postgres", f"/{name}")

    def disconnect_all(self) -> int:
        """End every session but this one, as a failover does."""
        query = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        with psycopg.connect(self.admin_url, autocommit=True) as connection:
            row = connection.execute(query + " AND usename = 'sweeps'").fetchone()
        assert row is not None
        return row[0]

    def _run(self, *command: str) -> None:
        line = [*self._as_user(), *command]
        done = subprocess.run(line, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def _as_user(self, *options: str) -> list[str]:
        user = ["--reuid", self.user, "--regid", self.user, "--clear-groups"] if os.geteuid() == 0 else []
        return ["setpriv", *user, *options]


@contextlib.contextmanager
def server() -> Iterator[Server]:
    bin_dir = binaries()
    assert bin_dir is not None
    folder = Path(tempfile.mkdtemp(prefix="longstate-postgres-"))
    running = Server(folder, bin_dir)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder)
        Path(f"{folder}.log").unlink(missing_ok=True)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

"""The faults. Each inflicts itself on a running sweep; False where there was nothing to hit just now."""

import contextlib
import errno
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import psycopg

from tests.campaign.arena import TRIAL, WORKER, Arena
from tests.sweeps.postgres_server import Server

BORDERS = ("ask", "mkdir", "checkpoint", "result", "tell", "mlflow-end")
TABLES = "trials, trial_user_attributes, trial_values, studies, study_user_attributes"

Inflict = Callable[[Arena, random.Random], bool]


def signal_one(module: str, number: int) -> Inflict:
    def inflict(arena: Arena, rng: random.Random) -> bool:
        found = arena.processes(module)
        with contextlib.suppress(psutil.Error):
            if found:
                rng.choice(found).send_signal(number)
                return True
        return False

    return inflict


def freeze_one(module: str) -> Inflict:
    """SIGSTOP for a while, then SIGCONT."""

    def inflict(arena: Arena, rng: random.Random) -> bool:
        found = arena.processes(module)
        with contextlib.suppress(psutil.Error):
            if found:
                victim = rng.choice(found)
                victim.suspend()
                time.sleep(rng.uniform(0.5, 3.0))
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.resume()
                return True
        return False

    return inflict


def kill_sweep(arena: Arena, rng: random.Random) -> bool:
    assert arena.process is not None
    if not arena.processes(WORKER):
        return False
    arena.process.kill()
    return True


def fill_disk(arena: Arena, rng: random.Random) -> bool:
    """Not one byte is left for a while."""
    if not arena.processes(WORKER):
        return False
    filler = arena.folder / "runs" / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            try:
                for size in (1 << 16, 4096, 1):
                    with contextlib.suppress(BlockingIOError):
                        while file.write(b"x" * size) == size:
                            pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
        deadline = time.monotonic() + rng.uniform(0.5, 4.0)
        while time.monotonic() < deadline:  # what others delete meanwhile is taken as well
            with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
                while file.write(b"x" * 4096) == 4096:
                    pass
            time.sleep(0.02)
    finally:
        filler.unlink()
    return True


def truncate_checkpoint(arena: Arena, rng: random.Random) -> bool:
    """Cut the newest checkpoint of a running trial, which is killed and must pass it over."""
    for victim in arena.processes(f"{TRIAL}train"):
        with contextlib.suppress(psutil.Error, OSError, StopIteration):
            run_dir = next(word.partition("=")[2] for word in victim.cmdline() if word.startswith("run_dir="))
            found = sorted((arena.folder / run_dir / "checkpoints").glob("step=*.ckpt"))
            if not found:
                continue
            victim.suspend()
            newest = max((arena.folder / run_dir / "checkpoints").glob("step=*.ckpt"))
            os.truncate(newest, int(newest.stat().st_size * rng.uniform(0.0, 0.99)))
            victim.kill()
            return True
    return False


def truncate_journal(arena: Arena, rng: random.Random) -> bool:
    """The host dies, and the journal's last bytes (up to a third of it) never reached the disk; it then ends
    in half a line, mostly."""
    journal = arena.study_dir / "journal.log"
    if not arena.processes(WORKER) or not journal.exists():
        return False
    arena.kill_everything()
    size = journal.stat().st_size
    os.truncate(journal, size - rng.randrange(1, max(2, int(size * rng.choice([0.001, 0.02, 0.34])))))
    return True


def jump_clock(arena: Arena, rng: random.Random) -> bool:
    if not arena.processes(WORKER):
        return False
    seconds = rng.choice([-1, 1]) * rng.choice([2.0, 90.0, 3600.0, 86400.0 * 400])
    temporary = arena.home / "clock.tmp"
    temporary.write_text(str(seconds))
    os.replace(temporary, arena.home / "clock")
    return True


def arm(border: str) -> Inflict:
    """Kill the next process that comes to the border; counted once it has fired."""

    def inflict(arena: Arena, rng: random.Random) -> bool:
        (arena.home / "armed" / f"{border}.{rng.choice(['before', 'after'])}").touch()
        return True

    return inflict


def lock_database(server: Server, uri: str) -> Inflict:
    """Every table locked against readers and writers for some seconds."""

    def inflict(arena: Arena, rng: random.Random) -> bool:
        if not arena.processes(WORKER):
            return False
        with contextlib.suppress(psycopg.Error), psycopg.connect(uri) as connection:
            connection.execute("SET lock_timeout = '5s'")
            connection.execute(f"LOCK TABLE {TABLES} IN ACCESS EXCLUSIVE MODE")  # type: ignore[call-overload]
            time.sleep(rng.uniform(0.5, 4.0))
            connection.rollback()
            return True
        return False

    return inflict


def kill_database(server: Server) -> Inflict:
    """SIGKILL to all of PostgreSQL, started again after a while."""

    def inflict(arena: Arena, rng: random.Random) -> bool:
        if not arena.processes(WORKER):
            return False
        server.kill()
        time.sleep(rng.uniform(0.2, 3.0))
        server.start()
        return True

    return inflict


def catalogue(server: Server | None = None, uri: str | None = None) -> dict[str, Inflict]:
    """Every kind by name."""
    kinds: dict[str, Inflict] = {
        "SIGKILL worker": signal_one(WORKER, signal.SIGKILL),
        "SIGKILL trial": signal_one(TRIAL, signal.SIGKILL),
        "SIGKILL sweeps.run": kill_sweep,
        "SIGTERM worker": signal_one(WORKER, signal.SIGTERM),
        "SIGTERM trial": signal_one(TRIAL, signal.SIGTERM),
        "SIGSTOP worker": freeze_one(WORKER),
        "SIGSTOP trial": freeze_one(TRIAL),
        "full disk": fill_disk,
        "truncated checkpoint": truncate_checkpoint,
        "truncated journal": truncate_journal,
        "clock jump": jump_clock,
    }
    kinds |= {f"kill at {border}": arm(border) for border in BORDERS}
    if server is not None and uri is not None:
        kinds |= {"locked database": lock_database(server, uri), "killed database": kill_database(server)}
    return kinds


def fired(arena: Arena) -> list[Path]:
    """The border kills that have happened, oldest first."""
    return sorted((arena.home / "fired").iterdir(), key=lambda path: int(path.name.rpartition(".")[2]))

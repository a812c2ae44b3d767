"""The commands of a trial, each a process group of its own that dies with this process."""

import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.load import to_yaml
from lightning_modules.run_dir import read_result, write_text
from lightning_modules.slurm import environment_for_child
from sweeps.trials.tether import tethered
from sweeps.trials.warm import Evaluation, evaluation_server

STOP_GRACE_SECONDS = 30.0
ASKED_TO_END = tuple(128 + number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_WORDS = (*map(os.strerror, FULL), "database or disk is full")  # the last is SQLite's
FULL_BYTES = 2**20  # a command that ended with less than this left had no room for its last words
BUSY = "is writing it: wait"  # how lightning_modules.run_dir refuses a second writer


class TrialFailed(Exception):
    """The trial ended without a result; the message says why, from its log."""


class Interrupted(Exception):
    """The worker was asked to stop; the trial can be continued later."""


class DiskFull(Exception):
    """There is no room for the run directory; the message says more. The trial has not failed."""


class Busy(Exception):
    """The run directory is being written by a process of an earlier claim, which is about to end."""


def last_words(log: Path, lines: int = 3) -> str:
    """Why a command failed: its `error:` line, else the last lines of its log."""
    text = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in text if line.startswith("error:")]
    return errors[-1] if errors else " | ".join(text[-lines:])[-500:]


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Runs commands until they end or `stop()` is true, calling `watch` all the while."""

    threads: int
    stop: Callable[[], bool]
    watch: Callable[[], None]
    warm: bool = False  # evaluations by this process's server

    def run(
        self,
        command: str,
        run_dir: Path,
        config: Any,
        overrides: list[str],
        environment: Mapping[str, str],
    ) -> dict[str, Any]:
        """Run `lightning_modules.<command>` on the run directory unless it is done; returns its result.

        A process killed, or asked to end, from outside (out of memory, by hand) is continued once, from its
        checkpoint.
        """
        done = ended(run_dir)
        if done:
            return done
        run_dir.mkdir(parents=True, exist_ok=True)
        if not (run_dir / "config.yaml").exists():
            write_text(run_dir / "config.yaml", to_yaml(config))
        config_file = str(run_dir / "config.yaml")  # a started run leaves run_dir out of it: it may be moved
        checkpoint = config.checkpoint if self.warm and command == "evaluate" else None
        line = [sys.executable, "-m", f"lightning_modules.{command}", config_file, f"run_dir={run_dir}"]
        log = run_dir / "log.txt"
        status = self._spawn([*line, *overrides], log, environment, checkpoint)
        if status < 0 or status in ASKED_TO_END:
            self._await_stop()
            status = self._spawn([*line, *overrides], log, environment, checkpoint)
        result = ended(run_dir)
        if result is None:
            if self.stop():  # a batch system tells worker and trial alike: the trial may be gone first
                raise Interrupted
            how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            said = last_words(log)
            if BUSY in said:
                raise Busy(said)
            if any(word in said for word in FULL_WORDS) or shutil.disk_usage(run_dir).free < FULL_BYTES:
                raise DiskFull(f"{run_dir}: {command}: {how}: {said}")
            raise TrialFailed(f"{command}: {how}: {said}")
        return result

    def _await_stop(self) -> None:
        """A batch system tells worker and trial alike: the trial may have heard of it first."""
        deadline = time.monotonic() + 1.0
        while not self.stop() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _spawn(
        self, line: list[str], log: Path, further: Mapping[str, str], checkpoint: str | None = None
    ) -> int:
        """Run the command, in the evaluation server where it evaluates a `checkpoint`; its exit status."""
        if self.stop():
            raise Interrupted
        set_aside_damaged(log.parent / "checkpoints")
        environment = environment_for_child()
        environment.pop("MLFLOW_RUN_ID", None)
        environment |= {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1", **further}
        with log.open("a") as output:
            output.write(f"$ {shlex.join(['python', *line[1:]])}\n")
            output.flush()
            process: subprocess.Popen | Evaluation
            if checkpoint is not None:
                process = evaluation_server().start(line[2:], log, checkpoint, environment)
            else:
                process = subprocess.Popen(
                    tethered(line, "SIGKILL"),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # a Ctrl-C reaches the sweep, which then stops its trials
                )
        try:
            while process.poll() is None:
                if self.stop():
                    raise Interrupted
                self.watch()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.05)
        except BaseException:
            _end_group(process)
            raise
        return process.wait()


def is_full(error: OSError) -> bool:
    """Whether a disk or a quota is full."""
    return error.errno in FULL


def set_aside_damaged(checkpoints: Path) -> None:
    """A training goes on from what it can read, from its start if need be, rather than fail for good."""
    for path in checkpoints.glob("step=*.ckpt"):
        if not zipfile.is_zipfile(path):  # as every complete one is
            path.rename(path.with_name(f"{path.name}.damaged"))
            print(f"{path}: truncated or damaged; set aside", flush=True)


def ended(run_dir: Path) -> dict[str, Any] | None:
    """The result of a command that has done its work, or has been told by a pruner to leave it."""
    result = read_result(run_dir)
    return result if result and result["status"] in ("completed", "pruned") else None


def _end_group(process: subprocess.Popen | Evaluation) -> None:
    """Ask the trial to save and end; kill it and its children when it takes too long."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

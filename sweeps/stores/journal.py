"""The journal file under a sweep's studies: appended whole or not at all, whatever kills or fills the disk.

Optuna's own backend leaves what a full disk or a dying host cuts short, and the next record then runs into
it: from there on nobody can read the file. Here half a line is dropped before the next is written, a full
disk is waited for, and a file that is damaged all the same is cut at the damage (`mend_journal`). Trials
forgotten by that are found again by their run directories (sweeps.mending.directories).
"""

import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from sweeps.endings import DatabaseGone
from sweeps.stores.locks import ProcessLock

FULL = (errno.ENOSPC, errno.EDQUOT)
PAUSE_SECONDS = 0.5


class Journal(BaseJournalBackend):
    """Optuna's records, a JSON line each, in one file that many processes append to."""

    def __init__(self, path: Path, patience: float = 0.0, stop: Callable[[], bool] = lambda: False) -> None:
        """patience: seconds to wait for room on a full disk, unless `stop()`."""
        self.path, self.patience, self.stop = path, patience, stop
        self._lock = lock_of(path)
        self._read = (0, 0)  # records that were read, and where they end
        path.touch()

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Records from this one on. Raises ValueError (one line) where the file is damaged."""
        number, offset = self._read if self._read[0] == log_number_from else (0, 0)
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < offset:
                raise DatabaseGone(f"{self.path} was cut short under this process; start it again")
            file.seek(offset)
            text = file.read()
        for line in text[: text.rfind(b"\n") + 1].splitlines(keepends=True):
            number, offset = number + 1, offset + len(line)
            if number <= log_number_from:
                continue
            record = _record(line)
            if record is None:
                raise ValueError(
                    f"{self.path}: line {number} is damaged: "
                    f"python -m sweeps.reconcile study={self.path.parent} repairs it"
                )
            self._read = (number, offset)
            yield record

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Raises DatabaseGone where the disk stays full for as long as patience says."""
        data = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        began, is_said = time.monotonic(), False
        while True:
            try:
                return self._append(data)
            except OSError as error:
                waited = time.monotonic() - began
                if error.errno not in FULL:
                    raise
                if waited > self.patience or self.stop():
                    raise DatabaseGone(f"{self.path} cannot be written ({error.strerror})") from None
            if not is_said:
                left = f"for {self.patience:.0f} s"
                print(f"storage: {self.path}: no space left; waiting {left}", file=sys.stderr, flush=True)
                is_said = True
            time.sleep(PAUSE_SECONDS)

    def _append(self, data: bytes) -> None:
        self._lock.acquire()
        try:
            with self.path.open("r+b", buffering=0) as file:
                end = _end_of_lines(file)
                file.truncate(end)
                file.seek(end)
                try:
                    if file.write(data) != len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(end)
                    raise
        finally:
            self._lock.release()


def mend_journal(path: Path) -> list[str]:
    """Cut the file where it is damaged and keep all of it beside; returns a line for each repair."""
    if not path.exists():
        return []
    lock = lock_of(path)
    lock.acquire()
    try:
        text = path.read_bytes()
        good = number = 0
        for line in text.splitlines(keepends=True):
            number += 1
            if not line.endswith(b"\n") or _record(line) is None:
                break
            good += len(line)
        if good == len(text):
            return []
        if b"\n" not in text[good:]:
            os.truncate(path, good)
            return [f"{path.name}: ended in half a line; dropped"]
        kept = path.with_name(f"{path.name}.damaged")
        while kept.exists():
            kept = kept.with_name(kept.name + "+")
        shutil.copyfile(path, kept)
        os.truncate(path, good)
        return [f"{path.name}: line {number} is damaged; cut there, all of it is kept as {kept.name}"]
    finally:
        lock.release()


def lock_of(path: Path) -> ProcessLock:
    """An flock: Optuna's locks are files that outlive a killed holder, and everybody waits for them."""
    return ProcessLock(path.with_name(path.name + ".lock"))


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # no UTF-8, either
        return None
    return record if isinstance(record, dict) and "op_code" in record else None


def _end_of_lines(file: Any) -> int:
    """Where the last complete line ends."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0

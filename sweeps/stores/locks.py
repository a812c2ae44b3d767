"""File locks that end with their holder: the kernel drops an flock when its process ends, however it ends."""

import fcntl
import os
from pathlib import Path


class ProcessLock:
    """An exclusive lock on a file, held until `release` or the process's end; children do not inherit it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def try_acquire(self) -> bool:
        """Take the lock unless another process (or another ProcessLock of this one) holds it."""
        return self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB)

    def acquire(self) -> bool:
        """Wait for the lock."""
        return self._lock(fcntl.LOCK_EX)

    def release(self) -> None:
        assert self._descriptor is not None, f"{self.path}: released but not held"
        os.close(self._descriptor)
        self._descriptor = None

    def keep(self, wait: bool = True) -> bool:
        """Whether it is still held: the kernel takes a lock from no living process."""
        return self._descriptor is not None

    def _lock(self, operation: int) -> bool:
        assert self._descriptor is None, f"{self.path}: already held"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, operation)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

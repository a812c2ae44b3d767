"""SIGTERM and Ctrl-C end a run in order: at the next point where nothing is lost, with an honest status."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Terminated(SystemExit):
    """The process was asked to end; uncaught, it exits with 128 + the signal's number and prints nothing."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class Termination:
    """Within the block, SIGTERM and SIGINT raise Terminated: at once, or if `deferred`, when the work looks.

    A second signal never waits. Outside the main thread, where Python cannot set handlers, it does nothing,
    nor in data workers, which inherit the handlers: the main process ends them after it has saved.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.deferred = False
        self._pid = os.getpid()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.getsignal(signum) for signum in SIGNALS}
            self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def install(self) -> None:
        """Make this the only handler: Lightning adds its own when it starts."""
        if self._previous:
            for signum in SIGNALS:
                signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        again, self.signum = self.signum is not None, signum
        if again or not self.deferred:
            raise Terminated(signum)

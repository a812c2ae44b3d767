"""SIGTERM, SIGUSR1 and Ctrl-C end a run in order: where nothing is lost next, with an honest status."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

# SIGUSR1 is what a batch system sends ahead of a time limit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Terminated(SystemExit):
    """The process was asked to end; uncaught, it exits with 128 + the signal's number and prints nothing."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class Termination:
    """Within the block, the signals raise Terminated: at once, or if `deferred`, when the work looks.

    It is raised once. A batch system repeats its signals and sends them to parent and child alike, so only a
    second Ctrl-C, from somebody who waits, is obeyed at once; what will not end must be killed. Outside the
    main thread, where Python cannot set handlers, it does nothing, nor in data workers, which inherit the
    handlers: the main process ends them after it has saved.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.deferred = False
        self._raised = False
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

    def end(self, signum: int) -> None:
        """Raise Terminated: the work has reached the point that a deferred signal waits for."""
        self._raised = True
        raise Terminated(signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        is_hurried = signum == signal.SIGINT and self.signum is not None
        self.signum = signum
        if is_hurried or not (self.deferred or self._raised):
            self.end(signum)

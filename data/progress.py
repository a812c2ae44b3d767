"""How far a long piece of work is: a bar on a terminal, elsewhere a line now and then."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

EVERY = 30.0  # seconds between lines


class WorkProgress:
    """Parts done of `total`, with tokens/s. Says nothing of work that is over within seconds."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done, self.tokens = title, total, 0, 0
        self._began = self._said = time.monotonic()
        self._earlier = 0  # parts that were not done by us: they say nothing about speed
        self._console = Console(stderr=True)
        self._bar: Progress | None = None

    def __enter__(self) -> "WorkProgress":
        if self._console.is_terminal:
            columns = [TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()]
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total)
        return self

    def advance(self, tokens: int | None) -> None:
        """One part more, `tokens` read in it; None: it was done before we began."""
        self.done += 1
        self.tokens += tokens or 0
        self._earlier += tokens is None
        now = time.monotonic()
        speed = f"{self.tokens / max(now - self._began, 1e-9):,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, description=f"{self.title}: {speed}")
        elif now - self._said >= EVERY:
            self._said = now
            left = (now - self._began) * (self.total - self.done) / max(self.done - self._earlier, 1)
            line = f"{self.title}: {self.done:,} of {self.total:,} parts, {speed}, {left / 60:,.0f} min left"
            print(line, file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

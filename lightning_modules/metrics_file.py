"""metrics.jsonl: every metric point of a run, in its own directory, each (key, step) once.

It outlives any tracking store, and says after a restart which points exist already: an exact resume computes
them again with the same values, so the first ones stand.
"""

import errno
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Point:
    """One value of one metric. time: milliseconds since the epoch."""

    key: str
    value: float
    step: int
    time: int


class MetricsFile:
    """Appends points, a line per step. A line that a kill or a full disk cut short is dropped on opening."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.points: list[Point] = []
        if path.is_file():
            self._read()
        self.seen = {(point.key, point.step) for point in self.points}

    def add(self, metrics: dict[str, float], step: int) -> list[Point]:
        """Remember and return the points that are new; `write` them next."""
        now = int(time.time() * 1000)
        fresh = [
            Point(key, float(v), step, now) for key, v in metrics.items() if (key, step) not in self.seen
        ]
        self.points += fresh
        self.seen.update((point.key, point.step) for point in fresh)
        return fresh

    def write(self, points: list[Point]) -> None:
        """Append points of one step. Raises OSError, and leaves the file as it was, if the disk refuses."""
        if not points:
            return
        record = {"step": points[0].step, "time": points[0].time, "metrics": {p.key: p.value for p in points}}
        data = (json.dumps(record) + "\n").encode()
        with open(self.path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)
                raise

    def _read(self) -> None:
        text = self.path.read_bytes()
        complete = text[: text.rfind(b"\n") + 1]
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                raise ValueError(f"{self.path}: line {number} is not JSON: delete that line") from None
            self.points += [Point(k, v, record["step"], record["time"]) for k, v in record["metrics"].items()]
        if len(complete) < len(text):
            with open(self.path, "ab") as file:
                file.truncate(len(complete))


def copy_points(points: list[Point], path: Path) -> None:
    """Begin a metrics file with another run's points; one that is there already keeps what it has."""
    file = MetricsFile(path)
    by_step: dict[int, list[Point]] = {}
    for point in points:
        if (point.key, point.step) not in file.seen:
            by_step.setdefault(point.step, []).append(point)
    for step in sorted(by_step):
        file.write(by_step[step])

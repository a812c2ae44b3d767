"""Which faults, on which sweeps, in which order: a function of the seed. When they strike within a sweep
depends on the machine as well."""

import os
import random
from collections import deque
from dataclasses import dataclass, field

from tests.campaign.faults import BORDERS
from tests.sweeps.postgres_server import INSTALL, binaries

EACH = 15
SIGNALS = tuple(
    f"{name} {whom}"
    for name, whom in (
        ("SIGKILL", "worker"),
        ("SIGKILL", "trial"),
        ("SIGKILL", "sweeps.run"),
        ("SIGTERM", "worker"),
        ("SIGTERM", "trial"),
        ("SIGSTOP", "worker"),
        ("SIGSTOP", "trial"),
    )
)
ANYWHERE = (*SIGNALS, "truncated checkpoint", "clock jump", *(f"kill at {b}" for b in BORDERS[:-1]))
JOURNAL_ONLY, DATABASE_ONLY, TRACKED_ONLY = (
    "truncated journal",
    ("locked database", "killed database"),
    ("kill at mlflow-end"),
)
ON_REAL = (
    "SIGKILL worker",
    "SIGKILL trial",
    "SIGTERM trial",
    "SIGTERM worker",
    "SIGSTOP trial",
    "truncated checkpoint",
)


@dataclass(kw_only=True)
class Lane:
    """Sweeps of one sort, one after the other until its faults are spent."""

    name: str
    faults: deque[str]
    samplers: tuple[str, ...] = ("grid", "tpe", "qmc")
    tracked: bool = False
    real: bool = False
    database: bool = False
    small_disk: bool = False
    step_seconds: float = 0.03


@dataclass(kw_only=True)
class Schedule:
    lanes: list[Lane]
    skipped: dict[str, str] = field(default_factory=dict)  # kind -> why

    @property
    def total(self) -> int:
        return sum(len(lane.faults) for lane in self.lanes)


def make_schedule(seed: int, each: int = EACH) -> Schedule:
    """`each` faults of every kind that this machine can inflict."""
    rng = random.Random(seed)
    skipped: dict[str, str] = {}
    can_mount, has_database = os.geteuid() == 0, binaries() is not None
    on_journal, on_database, on_tracked, on_real = [], [], [], []
    for kind in ANYWHERE:
        there = each - each // 3 if has_database else each
        on_journal += [kind] * there
        on_database += [kind] * (each - there)
    on_journal += [JOURNAL_ONLY] * each
    if can_mount:
        on_journal += ["full disk"] * each
    else:
        skipped["full disk"] = "a tmpfs of its own needs root"
    for kind in DATABASE_ONLY:
        if has_database:
            on_database += [kind] * each
        else:
            skipped[kind] = f"no PostgreSQL here: {INSTALL}"
    on_tracked += [TRACKED_ONLY] * each
    if each >= 3:
        on_tracked += list(SIGNALS)
        on_real += list(ON_REAL)
    for faults in (on_journal, on_database, on_tracked, on_real):
        rng.shuffle(faults)
    half = len(on_journal) // 2
    lanes = [
        Lane(name="journal", faults=deque(on_journal[:half]), small_disk=can_mount),
        Lane(name="postgres", faults=deque(on_database), database=True),
        Lane(name="journal-2", faults=deque(on_journal[half:]), small_disk=can_mount),
        Lane(name="tracked", faults=deque(on_tracked), tracked=True),
        Lane(name="real", faults=deque(on_real), real=True, samplers=("grid", "qmc")),
    ]
    return Schedule(lanes=[lane for lane in lanes if lane.faults], skipped=skipped)

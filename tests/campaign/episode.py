"""One sweep from its start to its end, under fire: started again by the same command whenever it stops."""

import contextlib
import random
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.campaign.arena import Arena
from tests.campaign.checks import broken_promises
from tests.campaign.faults import Inflict, fired

STARTS = 6  # a sweep that stops so often without a fault in between is stuck
SECONDS = 420.0


@dataclass(kw_only=True)
class Outcome:
    """What one sweep went through. struck: faults by kind; stopped: those after which the sweep had stopped,
    with a line, and the same command went on."""

    name: str
    struck: Counter[str] = field(default_factory=Counter)
    stopped: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    seconds: float = 0.0
    broken: list[str] = field(default_factory=list)


def run_episode(
    arena: Arena,
    faults: deque[str],
    kinds: dict[str, Inflict],
    rng: random.Random,
    undisturbed: dict | None,
    at_most: int = 14,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Take faults from the front of the queue until the sweep has ended; what has not struck stays there."""
    outcome, began = Outcome(name=arena.name), time.monotonic()
    armed: list[str] = []
    stops: list[str] = []  # since the last fault
    recent, seen, due = "none", 0, time.monotonic() + rng.uniform(2.0, 4.0)
    arena.start()
    outcome.starts = 1
    try:
        while True:
            for path in fired(arena)[seen:]:
                kind = f"kill at {path.name.partition('.')[0]}"
                armed.remove(kind)
                outcome.struck[kind] += 1
                recent, seen, stops = kind, seen + 1, []
                say(kind)
            assert arena.process is not None
            status = arena.process.poll()
            if status is not None:
                if status == 0:
                    break
                say(f"status {status} after {recent}: {last_line(arena)}")
                outcome.stopped[recent] += 1
                stops.append(recent)
                if len(stops) >= STARTS or time.monotonic() - began > SECONDS:
                    outcome.broken.append(f"has not ended after {outcome.starts} starts: {last_line(arena)}")
                    break
                arena.start()
                outcome.starts += 1
                due = time.monotonic() + rng.uniform(1.5, 3.0)
            elif time.monotonic() - began > SECONDS:
                outcome.broken.append(f"hangs: {arena.last_output()[-500:]}")
                break
            elif faults and time.monotonic() > due and outcome.struck.total() + len(armed) < at_most:
                kind = faults[0]
                if kind in armed:
                    faults.rotate(-1)
                elif kinds[kind](arena, rng):
                    faults.popleft()
                    if kind.startswith("kill at"):
                        armed.append(kind)
                    else:
                        outcome.struck[kind] += 1
                        recent, stops = kind, []
                        say(kind)
                    due = time.monotonic() + rng.uniform(0.2, 1.4)
            time.sleep(0.03)
        for path in (arena.home / "armed").iterdir():
            path.unlink()
        faults.extend(armed[: len(armed)])  # not reached
        arena.wait_until_gone()
        if not outcome.broken:
            outcome.broken = broken_promises(arena, undisturbed)
    except (AssertionError, OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
        outcome.broken.append(f"{type(error).__name__}: {error}")
    outcome.seconds = time.monotonic() - began
    return outcome


def last_line(arena: Arena) -> str:
    """The failed trials where the sweep names some, else its last words."""
    lines = [line for line in arena.last_output().splitlines() if line.strip()]
    failed = [line.strip() for line in lines if line.startswith("  train/trial-")]
    return "; ".join(failed or lines[-1:])[-300:] or "no word"


def keep_evidence(arena: Arena, target: Path) -> None:
    """Copy what a broken promise is to be understood from."""
    import shutil

    with contextlib.suppress(OSError, shutil.Error):
        shutil.copytree(arena.folder, target, dirs_exist_ok=True)

"""python -m tests.campaign [--seed N] [--each N] [--lanes NAME,...] [--out DIR] [--keep DIR]

At least `each` faults of every kind, on a seeded schedule, over sweeps of tiny trials; after every sweep,
what a sweep promises is checked. Prints a line per fault and sweep, then the table; with --out the table goes
into DIR/reliability.md and the figure beside it. Ends with 1 where a promise was broken; --keep is where such
sweeps are kept.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from tests.campaign.arena import Arena, Spec
from tests.campaign.checks import Fingerprint, fingerprint, study_of
from tests.campaign.episode import Outcome, keep_evidence, run_episode
from tests.campaign.faults import catalogue
from tests.campaign.report import Report, write_report
from tests.campaign.schedule import EACH, Lane, make_schedule
from tests.sweeps.postgres_server import server

LANES_AT_ONCE = 2
SWEEPS_AT_MOST = 40  # a lane
AT_ONCE = "at-once"  # as a lane: many workers on fresh stores


class Campaign:
    def __init__(self, seed: int, keep: Path | None) -> None:
        self.seed, self.keep = seed, keep
        self.began = time.monotonic()
        self.outcomes: list[Outcome] = []
        self.references: dict[tuple[str, bool], Fingerprint] = {}
        self._lock = threading.Lock()

    def say(self, line: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {line}", flush=True)

    def undisturbed(self, sampler: str, real: bool) -> Fingerprint | None:
        """What the sweep comes to without faults; run once. None for a sampler that learns."""
        if sampler == "tpe":
            return None
        with self._lock:
            if (sampler, real) not in self.references:
                folder = Path(tempfile.mkdtemp(prefix="longstate-campaign-"))
                spec = Spec(sampler=sampler, real=real)
                arena = Arena(folder=folder, spec=spec, name="undisturbed", step_seconds=0.005)
                try:
                    arena.start()
                    assert arena.process is not None
                    assert arena.process.wait(300) == 0, arena.last_output()
                    self.references[sampler, real] = fingerprint(arena, study_of(arena))
                finally:
                    arena.clean()
                self.say(f"undisturbed {sampler}{' (real)' if real else ''} done")
            return self.references[sampler, real]

    def run_lane(self, lane: Lane) -> None:
        """Sweeps until the lane's faults are spent; what breaks the lane itself is a broken promise."""
        try:
            self._run_sweeps(lane)
        except Exception as error:
            self.outcomes.append(Outcome(name=lane.name, broken=[f"{type(error).__name__}: {error}"]))
            self.say(f"{lane.name}: BROKEN: {error}")

    def _run_sweeps(self, lane: Lane) -> None:
        rng, number = random.Random(f"{self.seed}/{lane.name}"), 0
        with ExitStack() as stack:
            postgres = stack.enter_context(server()) if lane.database else None
            while lane.faults:
                sampler = lane.samplers[number % len(lane.samplers)]
                undisturbed = self.undisturbed(sampler, lane.real)
                uri = postgres.make_database(f"db{uuid.uuid4().hex[:12]}") if postgres else None
                spec = Spec(sampler=sampler, uri=uri, tracked=lane.tracked, real=lane.real)
                folder = Path(tempfile.mkdtemp(prefix="longstate-campaign-"))
                name = f"{lane.name}-{number}"
                arena = Arena(
                    folder=folder,
                    spec=spec,
                    name=name,
                    step_seconds=lane.step_seconds,
                    small_disk=lane.small_disk,
                )
                try:
                    outcome = run_episode(
                        arena,
                        lane.faults,
                        catalogue(postgres, uri),
                        rng,
                        undisturbed,
                        at_most=6 if lane.real else 14,
                        say=lambda line, name=name: self.say(f"{name}: {line}"),
                    )
                    if outcome.broken and self.keep is not None:
                        keep_evidence(arena, self.keep / name)
                finally:
                    arena.clean()
                self.outcomes.append(outcome)
                verdict = f"BROKEN: {' / '.join(outcome.broken)}" if outcome.broken else "kept"
                self.say(
                    f"{name} ({sampler}): {sum(outcome.struck.values())} faults, {outcome.starts} starts, "
                    f"{outcome.seconds:.0f} s; {verdict}"
                )
                number += 1
                if number > SWEEPS_AT_MOST:
                    raise RuntimeError(f"{len(lane.faults)} faults are left after {number} sweeps")

    def start_at_once(self, workers: int) -> Outcome:
        """So many workers on fresh stores, a trial each."""
        folder = Path(tempfile.mkdtemp(prefix="longstate-campaign-"))
        spec = Spec(sampler="grid", tracked=True, workers=workers, trials=workers)
        arena = Arena(folder=folder, spec=spec, name="at-once", step_seconds=0.01)
        try:
            outcome = run_episode(arena, deque(), {}, random.Random(0), undisturbed=None)
        finally:
            arena.clean()
        self.say(f"{workers} workers at once: {outcome.starts} starts, {outcome.broken or 'kept'}")
        return outcome


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tests.campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=EACH, help="faults of every kind")
    parser.add_argument(
        "--lanes", default="", help="only these: journal, journal-2, postgres, tracked, real, at-once"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="for reliability.png and the table in reliability.md"
    )
    parser.add_argument("--keep", type=Path, default=None, help="sweeps that broke a promise are copied here")
    args = parser.parse_args()
    schedule = make_schedule(args.seed, args.each)
    lanes = [lane for lane in schedule.lanes if not args.lanes or lane.name in args.lanes.split(",")]
    campaign = Campaign(args.seed, args.keep)
    for kind, why in schedule.skipped.items():
        campaign.say(f"skipped: {kind}: {why}")
    campaign.say(f"{sum(len(lane.faults) for lane in lanes)} faults to inflict")
    with ThreadPoolExecutor(LANES_AT_ONCE) as pool:
        list(pool.map(campaign.run_lane, lanes))
    at_once = campaign.start_at_once(24) if not args.lanes or AT_ONCE in args.lanes.split(",") else None
    report = Report(
        campaign.outcomes, schedule.skipped, args.seed, time.monotonic() - campaign.began, at_once
    )
    print(report.table())
    if args.out is not None:
        write_report(report, args.out)
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())

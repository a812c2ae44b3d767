"""python -m sweeps.worker study=DIR [index=0] [wait=SECONDS]

Run trials of a sweep, one after the other, until none is left to take. `sweeps.run` starts its own workers;
more can be started by hand or as cluster jobs, wherever the study directory (and, with storage.uri, the
database) is reachable. With wait=600 a worker outlives the pause between two stages,
and needs no sweeps.run beside it: it brings the sweep from stage to stage and writes its report.

Told to stop (SIGTERM, Ctrl-C) it lets its trial save and puts it back: another worker continues it.

Ends with 0 when nothing is left, 3 after too many failed trials in a row, 143 when it was told to stop.
"""

import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from conf.load import from_command_line, user_errors
from conf.sweep_schema import WorkerConfig
from sweeps.endings import STOPPED, TOO_MANY_FAILURES, DatabaseGone

if TYPE_CHECKING:
    from optuna.study import Study

    from sweeps.stores.store import Store
    from sweeps.trials.claims import Claim

BUSY_SECONDS = 5.0


def main(argv: list[str] | None = None) -> int:
    args = from_command_line(WorkerConfig, __doc__ or "", argv)
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stopping.append(received))
    with user_errors():
        from sweeps.trials.steps import DiskFull, is_full

        try:
            return work(args, stopping)
        except (DatabaseGone, DiskFull, OSError) as error:  # the next worker takes over a trial under way
            if isinstance(error, OSError) and not is_full(error):
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
            return STOPPED if stopping else 1


def work(args: WorkerConfig, stopping: list[int]) -> int:
    """Take and run trials until none is left; `stopping` fills when a signal asks for the end."""
    from sweeps.advance import Advance
    from sweeps.stores.store import Store
    from sweeps.stores.studies import last_failures
    from sweeps.stores.study_dir import load

    study_dir = Path(args.study)
    config = load(study_dir)
    since = time.time() if args.since is None else args.since
    store = Store(study_dir, config, wait=True, stop=lambda: bool(stopping))
    advance = Advance(store, stopping, say=lambda text: print(text, flush=True))
    idle_since = time.monotonic()
    while not stopping:
        studies = store.load_studies()
        if last_failures(studies, since) >= config.max_failures:
            print(f"stopping: the last {config.max_failures} trials failed", flush=True)
            return TOO_MANY_FAILURES
        together = take(store, studies)
        if together:
            train_first(together, stopping)
            for taken in together:
                run_one(taken, stopping)
            idle_since = time.monotonic()
        elif args.wait == 0 or advance.is_over() or time.monotonic() - idle_since >= args.wait:
            return 0
        else:
            time.sleep(min(1.0, args.wait))
    return STOPPED


def take(store: "Store", studies: "list[Study]") -> "list[Claim]":
    """The next trial; with side_by_side, the worker's share of those that are to be trained."""
    from sweeps.planning.samplers import point_of
    from sweeps.trials.claims import claim, to_take
    from sweeps.trials.side_by_side import share_of

    count, config = 1, store.config
    if config.side_by_side > 1:
        count = share_of(to_take(store, studies), config.side_by_side, config.workers)
    together: list[Claim] = []
    while len(together) < count:
        taken = claim(store, studies)
        if taken is None:
            break
        together.append(taken)
        if taken.stage != "train" or "checkpoint" in point_of(taken.trial):
            break
    return together


def train_first(together: "list[Claim]", stopping: list[int]) -> None:
    """Train several trials side by side; a stop is seen by each of them afterwards."""
    from sweeps.trials.claims import LostTrial
    from sweeps.trials.steps import Interrupted
    from sweeps.trials.trial import train_side_by_side

    if len(together) > 1:
        print(f"{', '.join(taken.name for taken in together)}: side by side", flush=True)
        with suppress(Interrupted, LostTrial):  # each finds out for itself
            train_side_by_side(together, stop=lambda: bool(stopping))


def run_one(taken: "Claim", stopping: list[int]) -> None:
    """Run a claimed trial and record how it ended; what stops it, but for its own failure, fails nothing."""
    from sweeps.trials import claims
    from sweeps.trials.steps import Busy, DiskFull, Interrupted, TrialFailed
    from sweeps.trials.trial import run_trial

    try:
        print(f"{taken.name}: started", flush=True)
        outcome = run_trial(taken, stop=lambda: bool(stopping))
        if outcome.is_pruned:
            claims.prune(taken, outcome.seconds, outcome.known)
            print(f"{taken.name}: pruned after {outcome.seconds:.0f} s", flush=True)
        else:
            claims.finish(taken, outcome.values, outcome.seconds, outcome.known, outcome.excesses)
            values = ", ".join(f"{value:g}" for value in outcome.values.values())
            print(f"{taken.name}: {values} after {outcome.seconds:.0f} s", flush=True)
    except TrialFailed as error:
        claims.fail(taken, str(error))
        print(f"{taken.name}: failed: {error}", flush=True)
    except Interrupted:
        claims.put_back(taken)
        print(f"{taken.name}: interrupted, to be continued", flush=True)
    except DiskFull:
        claims.put_back(taken)
        raise
    except Busy as error:
        claims.put_back(taken)
        print(f"{taken.name}: {error}; it waits again", flush=True)
        time.sleep(BUSY_SECONDS)
    except claims.LostTrial as error:
        print(str(error), flush=True)
    finally:
        taken.lock.release()


if __name__ == "__main__":
    sys.exit(main())

"""python -m sweeps.worker study=DIR [index=0]

Run trials of a sweep, one after the other, until none is left to take. `sweeps.run` starts its own workers;
more can be started by hand, wherever the study directory is visible.

Ends with 0 when nothing is left, 3 after too many failed trials in a row, 143 when it was told to stop.
"""

import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from conf.load import from_command_line, user_errors
from conf.sweep_schema import SweepConfig, WorkerConfig

if TYPE_CHECKING:
    from optuna.study import Study

    from sweeps.studies import Claim

TOO_MANY_FAILURES = 3
STOPPED = 128 + signal.SIGTERM


def main(argv: list[str] | None = None) -> int:
    args = from_command_line(WorkerConfig, __doc__ or "", argv)
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stopping.append(received))
    with user_errors():
        return work(args, stopping)


def work(args: WorkerConfig, stopping: list[int]) -> int:
    """Take and run trials until none is left; `stopping` fills when a signal asks for the end."""
    from sweeps.studies import last_failures, load_studies
    from sweeps.study_dir import load

    study_dir = Path(args.study)
    config = load(study_dir)
    since = time.time() if args.since is None else args.since
    studies = load_studies(study_dir)
    while not stopping:
        if last_failures(studies, since) >= config.max_failures:
            print(f"stopping: the last {config.max_failures} trials failed", flush=True)
            return TOO_MANY_FAILURES
        together = take(study_dir, studies, config, args.index)
        if not together:
            return 0
        train_first(together, config, study_dir, stopping)
        for taken in together:
            run_one(taken, config, study_dir, stopping)
    return STOPPED


def take(study_dir: Path, studies: "list[Study]", config: SweepConfig, worker: int) -> "list[Claim]":
    """The next trial; with side_by_side, the worker's share of those that are to be trained."""
    from sweeps.side_by_side import share_of
    from sweeps.studies import claim, point_of, to_take

    count = 1
    if config.side_by_side > 1:
        count = share_of(to_take(study_dir, studies), config.side_by_side, config.workers)
    together: list[Claim] = []
    while len(together) < count:
        taken = claim(study_dir, studies, config, worker)
        if taken is None:
            break
        together.append(taken)
        if taken.stage != "train" or "checkpoint" in point_of(taken.trial):
            break
    return together


def train_first(together: "list[Claim]", config: SweepConfig, study_dir: Path, stopping: list[int]) -> None:
    """Train several trials side by side; a stop is seen by each of them afterwards."""
    from sweeps.trial import Interrupted, train_side_by_side

    if len(together) > 1:
        print(f"{', '.join(taken.name for taken in together)}: side by side", flush=True)
        with suppress(Interrupted):
            train_side_by_side(together, config, study_dir, stop=lambda: bool(stopping))


def run_one(taken: "Claim", config: SweepConfig, study_dir: Path, stopping: list[int]) -> None:
    """Run what is left of a claimed trial and record how it ended."""
    from sweeps.studies import fail, finish
    from sweeps.trial import Interrupted, TrialFailed, run_trial

    try:
        print(f"{taken.name}: started", flush=True)
        outcome = run_trial(taken, config, study_dir, stop=lambda: bool(stopping))
        finish(taken, outcome.value, outcome.seconds, outcome.mlflow_run_id)
        print(f"{taken.name}: {outcome.value:g} after {outcome.seconds:.0f} s", flush=True)
    except TrialFailed as error:
        fail(taken, str(error))
        print(f"{taken.name}: failed: {error}", flush=True)
    except Interrupted:
        print(f"{taken.name}: interrupted, to be continued", flush=True)
    finally:
        taken.lock.release()


if __name__ == "__main__":
    sys.exit(main())

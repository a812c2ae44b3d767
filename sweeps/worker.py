"""python -m sweeps.worker study=DIR [index=0] [wait=SECONDS]

Run trials of a sweep, one after the other, until none is left to take. `sweeps.run` starts its own workers;
more can be started by hand, wherever the study directory is visible. With wait=600, say, they need no
sweeps.run beside them: they bring the sweep from stage to stage and write its report.

Ends with 0 when nothing is left, 3 after too many failed trials in a row, 143 when it was told to stop.
"""

import signal
import sys
import time
from pathlib import Path

from conf.load import from_command_line, user_errors
from conf.sweep_schema import WorkerConfig

POLL_SECONDS = 1.0
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
    from sweeps.advance import Advance
    from sweeps.studies import claim, fail, finish, last_failures, load_studies
    from sweeps.study_dir import load
    from sweeps.trial import Interrupted, TrialFailed, run_trial

    study_dir = Path(args.study)
    config = load(study_dir)
    since = time.time() if args.since is None else args.since
    studies = load_studies(study_dir)
    advance = Advance(study_dir, stopping, say=lambda text: print(text, flush=True))
    patient_until = time.monotonic() + args.wait
    while not stopping:
        if last_failures(studies, since) >= config.max_failures:
            print(f"stopping: the last {config.max_failures} trials failed", flush=True)
            return TOO_MANY_FAILURES
        taken = claim(study_dir, studies, config, args.index)
        if taken is None:
            if args.wait == 0 or advance.is_over() or time.monotonic() > patient_until:
                return 0
            time.sleep(POLL_SECONDS)
            studies = load_studies(study_dir)
            continue
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
            patient_until = time.monotonic() + args.wait
    return STOPPED


if __name__ == "__main__":
    sys.exit(main())

"""python -m sweeps.reconcile study=DIR

Repair what kills have left of a sweep: a journal that was cut short, trials marked as running whose worker
is gone, results that nobody recorded, records without results, run directories without a trial, MLflow runs
left RUNNING, names that do not agree. Prints a line for each repair; a second time it finds nothing. Trials
that are being worked on are left alone, and a preempted trial is never called failed: it waits, to be
continued under its number.

`sweeps.run` does the same at its start.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from conf.load import from_command_line, user_errors
from conf.sweep_schema import ReconcileConfig

if TYPE_CHECKING:
    from optuna.study import Study

    from sweeps.stores.store import Store


def main(argv: list[str] | None = None) -> int:
    args = from_command_line(ReconcileConfig, __doc__ or "", argv)
    with user_errors():
        from sweeps.endings import DatabaseGone
        from sweeps.stores.studies import open_store

        try:
            lines = reconcile(open_store(Path(args.study), repair=True))
        except DatabaseGone as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    for line in lines:
        print(line)
    print(f"{len(lines)} repaired." if lines else "Nothing to repair.")
    return 0


def reconcile(store: "Store", *, holds_sweep_lock: bool = False) -> list[str]:
    """Repair every study of the sweep and its MLflow runs; returns a line for each repair.

    holds_sweep_lock: the caller is the sweep itself, whose own MLflow runs are in use.
    """
    from sweeps.mending.runs import mend_runs

    lines = store.repairs + [line for study in store.load_studies() for line in mend_study(store, study)]
    if store.config.tracking.enabled:
        lines += mend_runs(store, holds_sweep_lock=holds_sweep_lock)
    return lines


def mend_study(store: "Store", study: "Study") -> list[str]:
    """Make the study and its run directories agree; returns a line for each repair."""
    from sweeps.mending.directories import mend_directories
    from sweeps.mending.trials import mend_trials

    return mend_directories(store, study) + mend_trials(store, study)


if __name__ == "__main__":
    sys.exit(main())

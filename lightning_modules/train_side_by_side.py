"""Train several small passkey runs side by side in this process.

    python -m lightning_modules.train_side_by_side run_dirs=[DIR,DIR,...]

Each DIR holds the config.yaml of a run, and gets what lightning_modules.train leaves in it. Finished ones are
passed over; stopped ones go on. Ends with 0, or with 1 when a run has failed: the others are trained anyway.
"""

import signal
import sys
from pathlib import Path

from conf.load import from_command_line, parse, user_errors
from conf.schema import SideBySideConfig, TrainConfig
from lightning_modules.imports import UNUSED_BY_LIGHTNING, heavy_imports
from lightning_modules.run_dir import open_run_dir, read_result
from lightning_modules.termination import Terminated


def main(argv: list[str] | None = None) -> int:
    args = from_command_line(SideBySideConfig, __doc__ or "", argv)
    with user_errors():
        paths = [Path(path) for path in args.run_dirs if read_result(Path(path)) is None]
        runs = [open_run_dir(path, parse(TrainConfig, [str(path / "config.yaml")])) for path in paths]
        if not runs:
            return 0
        with heavy_imports(UNUSED_BY_LIGHTNING):
            from lightning_modules.side_by_side import report, train_side_by_side

        try:
            failed = train_side_by_side(runs)
        except Terminated as end:
            print(
                f"stopped by {signal.Signals(end.signum).name}; the same command continues", file=sys.stderr
            )
            raise
    report(failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

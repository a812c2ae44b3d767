"""python -m sweeps.run conf/sweep/NAME.yaml [key=value ...]

Run a sweep to its end: train models over a space, try mitigations on those that collapse worst, report; or,
with capacity.series, search how long a training length each state size needs and fit laws to it. Safe
to interrupt (Ctrl-C) and to start again with the same command, which goes on. Everything is left in study_dir
(runs/<name>) and in MLflow.

workers=0 starts no workers: it makes the stores, plans and queues what the finished trials allow, and ends
with 75 while trials are left to workers elsewhere. slurm/submit_sweep.sh begins with it.

Ends with 0, with 1 when trials have failed, with 2 for a config that does not hold, with 75 when
budget_minutes= are over and the same command goes on.
"""

import shlex
import sys
from pathlib import Path

from conf.load import from_command_line, user_errors
from conf.sweep_schema import SweepConfig, check


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    config = from_command_line(SweepConfig, __doc__ or "", argv)
    with user_errors():
        check(config)
        from sweeps.conduct import conduct

        return conduct(config, command=shlex.join([_python(), "-m", "sweeps.run", *argv]))


def _python() -> str:
    """This Python as it can be typed here: `make` runs .venv/bin/python, which need not be on the PATH."""
    here = Path(sys.executable)
    return str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else "python"


if __name__ == "__main__":
    sys.exit(main())

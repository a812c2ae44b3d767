"""Check, in seconds, that what a job needs is there: python -m sweeps.preflight [CONFIG.yaml] [key=value ...]

CONFIG.yaml is what train or sweeps.run would be given; without one the defaults of train are checked.
Versions, the run or study directory with its locks and free disk, both stores, compilers and caches, ports,
devices, and an all-reduce over all ranks: with NCCL where there are GPUs, else with gloo. One line a check.

Started by srun it is one rank of many, and all are checked; else it starts the ranks of one node itself.

    python -m sweeps.preflight conf/train/demo.yaml
    python -m sweeps.preflight conf/sweep/demo.yaml free_gib=100
    srun python -m sweeps.preflight CONFIG.yaml trainer.num_nodes=2 trainer.devices=8     # in a job

Ends with 0, or with 1 and the sentence of the first check that failed.
"""

import dataclasses
import sys
import time
from collections.abc import Callable

from omegaconf import OmegaConf

from conf.load import from_command_line, parse, user_errors
from conf.preflight import PreflightConfig
from conf.schema import TrainConfig
from conf.sweep_schema import SweepConfig, check, train_base
from lightning_modules.run_dir import is_rank_zero
from sweeps.readiness.checks import Subject, checks_of


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    own = {field.name for field in dataclasses.fields(PreflightConfig)}
    mine = [word for word in argv if word.split("=")[0] in own or word in ("-h", "--help")]
    settings = from_command_line(PreflightConfig, __doc__ or "", mine)
    with user_errors():
        subject = read_subject([word for word in argv if word not in mine])
    return run(checks_of(subject, settings))


def read_subject(argv: list[str]) -> Subject:
    """The training or sweep that `argv` describes. Raises ValueError (one line) where it does not hold."""
    if not is_sweep(argv):
        config = parse(TrainConfig, argv)
        return Subject(directory=config.run_dir or "runs", tracking=config.tracking, trainer=config.trainer)
    sweep = parse(SweepConfig, argv)
    check(sweep)
    return Subject(
        directory=sweep.directory, tracking=sweep.tracking, trainer=train_base(sweep).trainer, sweep=sweep
    )


def is_sweep(argv: list[str]) -> bool:
    """Whether one of the YAML files has what only sweeps have."""
    only_sweeps = {field.name for field in dataclasses.fields(SweepConfig)}
    only_sweeps -= {field.name for field in dataclasses.fields(TrainConfig)}
    keys: set[str] = set()
    for word in argv:
        if "=" not in word and word.endswith((".yaml", ".yml")):
            try:
                keys |= set(OmegaConf.load(word))
            except (OSError, ValueError, TypeError):
                continue  # the parser says it better
    return bool(keys & only_sweeps)


def run(checks: dict[str, Callable[[], str]]) -> int:
    """Print a line for every check, as soon as it is over; returns the exit status."""
    failures = []
    for name, look in checks.items():
        began = time.monotonic()
        try:
            line = f"ok    {name:<11} {look()} ({time.monotonic() - began:.1f} s)"
        except ValueError as error:
            failures.append(str(error))
            line = f"FAIL  {name:<11} {error}"
        if is_rank_zero() or line.startswith("FAIL"):
            print(line, flush=True)
    if failures:
        print(f"error: preflight: {failures[0]}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

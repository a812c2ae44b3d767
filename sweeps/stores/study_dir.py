"""What a study directory remembers of its sweep, so that the same command goes on and another one is refused.

sweep.yaml      the resolved sweep             journal.log    the Optuna studies (unless storage.uri is set)
sweep.id        names this directory in a database
base.yaml       what every training trial starts from, overrides included
train/trial-0000/, mitigation-0003/trial-0000/, confirm-0003/trial-0000/    run directories
figures/, report.txt        workers/    what the workers printed        locks/    held by living processes
"""

from pathlib import Path
from typing import Any

from conf.load import flatten, parse, to_yaml
from conf.sweep_schema import SweepConfig, train_base
from lightning_modules.run_dir import write_text

# Settings of the machine rather than of the study: they may change from one start to the next.
CHANGEABLE = {
    *("workers", "retry_failed", "threads", "max_failures", "study_dir", "print_config", "train.base"),
    *("storage.patience", "side_by_side", "budget_minutes", "warm"),
    # A search for thresholds is a function of the outcomes so far: it goes on over other lengths, too.
    *("capacity.lengths", "capacity.coarse", "capacity.resamples"),
}


def prepare(config: SweepConfig) -> Path:
    """Make the study directory, or check that it holds this very sweep; returns it."""
    study_dir = Path(config.directory)
    base = train_base(config)
    if (study_dir / "sweep.yaml").exists():
        _refuse_another(study_dir, flatten(load(study_dir)), flatten(config), "")
        _refuse_another(study_dir, flatten(train_base(load(study_dir))), flatten(base), "train.base: ")
    try:
        study_dir.mkdir(parents=True, exist_ok=True)
        write_text(study_dir / "base.yaml", to_yaml(base))
        write_text(study_dir / "sweep.yaml", to_yaml(config))
    except OSError as error:
        raise ValueError(f"study_dir={study_dir}: {error.strerror}; choose a writable place") from None
    return study_dir


def load(study_dir: Path) -> SweepConfig:
    """The sweep of an existing study directory, wherever it has been moved."""
    if not (study_dir / "sweep.yaml").is_file():
        raise ValueError(f"study={study_dir}: no sweep.yaml there; give the study_dir of a sweep")
    here = {"study_dir": str(study_dir), "train.base": str(study_dir / "base.yaml")}
    return parse(SweepConfig, [str(study_dir / "sweep.yaml"), here])


def _refuse_another(study_dir: Path, old: dict[str, Any], new: dict[str, Any], where: str) -> None:
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name), new.get(name)
        grown = ".budget." in name and before is not None and (now is None or now > before)
        overridden = name.startswith("train.overrides")  # compared where it shows: in the resolved base
        if before != now and name not in CHANGEABLE and not grown and not overridden:
            raise ValueError(
                f"{where}{name}={now}: {study_dir} holds a sweep made with {before}; "
                f"use another study_dir= or remove {study_dir}"
            )

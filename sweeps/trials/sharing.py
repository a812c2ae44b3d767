"""Trials that share work: a longer training goes on from where a shorter one of the same config stood.

Two trials that differ in trainer.max_steps alone pass through the same states until the learning rate of the
shorter one begins to fall (optim.decay_fraction). The shorter one leaves its checkpoint of that moment,
stable.ckpt, and the longer one begins there: the same weights, bit for bit, as if it had trained from the
start. While a shorter relative is still open, the longer one waits for it.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from conf.load import parse
from conf.schema import TrainConfig
from conf.search_space import unfold
from conf.sweep_schema import SweepConfig
from lightning_modules.run_dir import read_result
from lightning_modules.schedule import stable_steps
from sweeps.planning.budget import has_begun
from sweeps.planning.samplers import point_of
from sweeps.stores.store import Store
from sweeps.stores.studies import trial_name, trials_of

STEPS = "trainer.max_steps"


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What a trial can begin with: a stable.ckpt after so many steps, or nothing; and why, in words."""

    path: Path | None
    steps: int
    why: str


def has_lengths(config: SweepConfig) -> bool:
    """Whether training trials may differ in length at all."""
    return STEPS in unfold(config.train.space)


def deferred(
    waiting: Sequence[FrozenTrial], trials: Sequence[FrozenTrial], study: Study, config: SweepConfig
) -> set[int]:
    """Numbers of the waiting trials that will go on from a shorter one which is not there yet."""
    if study.user_attrs["stage"] != "train" or not has_lengths(config):
        return set()
    shorter: dict[str, list[FrozenTrial]] = {}
    for trial in trials:
        if trial.state in (TrialState.WAITING, TrialState.RUNNING) and STEPS in point_of(trial):
            shorter.setdefault(_family(trial), []).append(trial)
    return {
        trial.number
        for trial in waiting
        if STEPS in point_of(trial) and not has_begun(trial)
        for other in shorter[_family(trial)]
        if point_of(other)[STEPS] < point_of(trial)[STEPS] and _overlap(other, config) > 0
    }


def find_shared(store: Store, study: Study, trial: Any) -> Shared | None:
    """The longest stretch that a finished relative has trained already; None without a relative."""
    found: Shared | None = None
    reasons = []
    for other in trials_of(study, TrialState.COMPLETE, TrialState.PRUNED):
        if not _is_shorter(other, trial):
            continue
        name, path = trial_name(study, other.number), store.run_dir(study, other.number)
        steps = _overlap(other, store.config)
        stable = path / "checkpoints" / "stable.ckpt"
        result = read_result(path)
        if steps == 0:
            reasons.append(f"{name}: its learning rate has no stable phase (optim.decay_fraction)")
        elif not stable.exists() or result is None:
            reasons.append(f"{name}: left no stable.ckpt")
        elif not is_whole(stable):
            reasons.append(f"{name}: its stable.ckpt is damaged")
        elif found is None or steps > found.steps:
            found = Shared(path=stable, steps=steps, why=f"continues {name} from step {steps}")
    if found is None and reasons:
        return Shared(path=None, steps=0, why=f"begins anew: {'; '.join(reasons)}")
    return found


def is_whole(checkpoint: Path) -> bool:
    """Whether every part of the file is there and has its checksum."""
    try:
        with ZipFile(checkpoint) as file:
            return file.testzip() is None
    except (OSError, BadZipFile, zlib.error):
        return False


def _is_shorter(other: FrozenTrial, trial: Any) -> bool:
    """Whether the two are the same training but for its length. A point not chosen yet matches none."""
    ours, theirs = point_of(trial), point_of(other)
    if STEPS not in ours or STEPS not in theirs or theirs[STEPS] >= ours[STEPS]:
        return False
    return _family(other) == _family(trial)


def _family(trial: Any) -> str:
    """What trials of one training have in common whatever its length."""
    point = {name: value for name, value in point_of(trial).items() if name != STEPS}
    return json.dumps([point, trial.user_attrs.get("seed")], sort_keys=True)


def _overlap(trial: FrozenTrial, config: SweepConfig) -> int:
    return _stable_steps(config.train.base, json.dumps(point_of(trial)))


@lru_cache(maxsize=10_000)
def _stable_steps(base: str, point: str) -> int:
    trained = parse(TrainConfig, [base, json.loads(point)])
    return stable_steps(trained.optim, trained.trainer.max_steps)

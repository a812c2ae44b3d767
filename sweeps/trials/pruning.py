"""Pruning by tokens: a trial's validation points go to Optuna as they appear, and an answer goes back.

Intermediate values are stored with the objective's direction, so that larger (or smaller) is better alike.
A pruner sees the trials of one group only, whose curves can be compared at equal tokens.
"""

import json
from collections.abc import Container
from typing import Any

from optuna.pruners import BasePruner, HyperbandPruner, PercentilePruner, SuccessiveHalvingPruner
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from conf.load import flatten
from conf.schema import TrainConfig
from conf.sweep_stages import PrunerConfig, TrainStageConfig
from lightning_modules.verdict import VARIABLE, write_verdict
from sweeps.trials.claims import Claim

GROUP = "group"


def group_of(config: TrainConfig) -> str:
    """What trials must share to be compared: data (lengths, tokens a step), schedule, validation points."""
    compared = {
        name: value
        for name, value in flatten(config).items()
        if (name.startswith("data.") and name != "data.num_workers")
        or name in ("trainer.max_steps", "trainer.val_every", "model.vocab_size")
    }
    return json.dumps(compared, sort_keys=True)


def tokens_per_step(config: TrainConfig) -> int:
    return config.data.batch_size * config.data.train_length


def make_pruner(settings: PrunerConfig, max_tokens: int) -> BasePruner:
    first = int(settings.min_tokens)
    if settings.name == "halving":
        return SuccessiveHalvingPruner(min_resource=max(1, first), reduction_factor=settings.reduction_factor)
    if settings.name == "hyperband":
        return HyperbandPruner(
            min_resource=max(1, first), max_resource=max_tokens, reduction_factor=settings.reduction_factor
        )
    share = 50.0 if settings.name == "median" else settings.percentile
    return PercentilePruner(share, n_startup_trials=settings.startup_trials, n_warmup_steps=first)


class GroupView:
    """A storage as a pruner is to see it: one group's trials. Hyperband makes studies of its own on it."""

    def __init__(self, storage: BaseStorage, group: str) -> None:
        self._storage, self._group = storage, group

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = self._storage.get_all_trials(study_id, deepcopy, states)
        return [trial for trial in trials if trial.user_attrs.get(GROUP) == self._group]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


class Follower:
    """Reads the validation points of a running trial, and judges it after each."""

    def __init__(self, taken: Claim, stage: TrainStageConfig, config: TrainConfig) -> None:
        self.taken, self.settings, self.verdict = (
            taken,
            stage.pruner,
            taken.run_dir.resolve() / "verdict.json",
        )
        self._scale = tokens_per_step(config)
        self._same_way = stage.pruner.direction == stage.direction
        pruner = make_pruner(stage.pruner, config.trainer.max_steps * self._scale)
        view: Any = GroupView(taken.study._storage, group_of(config))
        self._study = Study(taken.study.study_name, view, pruner=pruner)
        self._reported = set(self._frozen().intermediate_values)
        self._file, self._read = taken.run_dir / "metrics.jsonl", 0
        self.verdict.unlink(missing_ok=True)

    @property
    def environment(self) -> dict[str, str]:
        """Tells the training where to look for its verdicts."""
        return {VARIABLE: str(self.verdict)}

    def poll(self) -> None:
        """Report what is new; answer the newest point."""
        newest = None
        for step, value in self._new_points():
            newest, tokens = step, step * self._scale
            if tokens not in self._reported:
                self.taken.trial.report(value if self._same_way else -value, tokens)
                self._reported.add(tokens)
        if newest is not None:
            # NumPy's bool, of some pruners
            prune = bool(self._study.pruner.prune(self._study, self._frozen()))
            write_verdict(self.verdict, newest, prune)

    def _frozen(self) -> FrozenTrial:
        return self.taken.study._storage.get_trial(self.taken.trial._trial_id)

    def _new_points(self) -> list[tuple[int, float]]:
        points: list[tuple[int, float]] = []
        for record in self._new_records():
            if self.settings.metric in record["metrics"]:
                points.append((record["step"], record["metrics"][self.settings.metric]))
        return points

    def _new_records(self) -> list[dict[str, Any]]:
        """The complete lines that have been added to the metrics file."""
        if not self._file.exists():
            return []
        with self._file.open("rb") as file:
            if file.seek(0, 2) < self._read:  # a line cut short by a kill has been dropped
                self._read = 0
            file.seek(self._read)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._read += len(complete)
        return [json.loads(line) for line in complete.splitlines()]

"""The study of capacity: its plan grows from its results, and its results are thresholds by state size."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from optuna.study import Study
from optuna.trial import TrialState

from conf.capacity import RETRY_SEED, StateSize, run_point, state_sizes
from conf.sweep_schema import SweepConfig, train_base
from sweeps.laws.fits import Law, Threshold, fit_law
from sweeps.laws.outcomes import Criterion, Judged, criterion_of, longest
from sweeps.laws.thresholds import Interval, Outcome, Run, Search, interval, next_runs, settle
from sweeps.planning.plans import Plan, Planned
from sweeps.reports.results import finished
from sweeps.stores.studies import latest, trials_of

STUDY = "capacity"
Kind = Literal["forget", "recall"]
Count = Literal["total", "ssm"]
COUNTS: dict[Count, str] = {"total": "SSM and convolution state", "ssm": "SSM state alone"}


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What a study has found so far."""

    config: SweepConfig
    sizes: list[StateSize]
    judged: dict[Run, Judged]
    failed: dict[Run, str]

    @property
    def search(self) -> Search:
        return search_of(self.config)

    @cached_property
    def criterion(self) -> Criterion:
        return criterion_of(self.config)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The laws that this study can find: language models are asked for no needle."""
        return ("forget", "recall") if self.criterion.has_recall else ("forget",)

    @property
    def series(self) -> list[str]:
        return list(self.config.capacity.series)

    @property
    def outcomes(self) -> dict[Run, Outcome]:
        return {run: judged.outcome for run, judged in self.judged.items()}

    @property
    def is_complete(self) -> bool:
        return not next_runs(self.search, [size.key for size in self.sizes], self.outcomes)

    def size(self, key: str) -> StateSize:
        return next(size for size in self.sizes if size.key == key)

    def forget(self, size: str, seed: int, outcomes: Mapping[Run, Outcome] | None = None) -> Interval | None:
        """T_forget of one size and seed: the shortest training length without collapse."""
        return interval(settle(self.search, size, seed, self.outcomes if outcomes is None else outcomes)[0])

    def recall(self, size: str, seed: int) -> Interval | None:
        """T_recall of one size and seed: the longest context recalled, over all its training lengths."""
        found = [
            judged.recalled
            for run, judged in self.judged.items()
            if (run.size, run.seed) == (size, seed) and judged.recalled is not None
        ]
        return longest(found)

    def threshold(
        self, kind: Kind, size: str, seed: int, outcomes: Mapping[Run, Outcome] | None = None
    ) -> Interval | None:
        return self.forget(size, seed, outcomes) if kind == "forget" else self.recall(size, seed)

    def thresholds(
        self, kind: Kind, series: str, count: Count, outcomes: Mapping[Run, Outcome] | None = None
    ) -> list[Threshold]:
        """Of the sizes of a series; what is missing is left out."""
        found = []
        for size in self.sizes:
            for seed in self.search.seeds if series in size.series else ():
                known = self.threshold(kind, size.key, seed, outcomes)
                if known is not None:
                    n = float(size.total if count == "total" else size.ssm)
                    found.append(Threshold(size=size.key, seed=seed, n=n, interval=known))
        return found

    def law(self, kind: Kind, series: str, count: Count) -> Law:
        """All forms fitted; the intervals resample seeds and, where they leave doubt, prompts."""

        def redraw(generator: np.random.Generator) -> list[Threshold]:
            outcomes = {run: judged.redraw(generator) for run, judged in self.judged.items()}
            return self.thresholds(kind, series, count, outcomes)

        in_doubt = kind == "forget" and any(judged.doubt > 1e-3 for judged in self.judged.values())
        return fit_law(
            self.thresholds(kind, series, count),
            resamples=self.config.capacity.resamples,
            seed=self.config.seed,
            redraw=redraw if in_doubt else None,
        )


def search_of(config: SweepConfig) -> Search:
    settings = config.capacity
    return Search(
        lengths=tuple(settings.lengths),
        seeds=tuple(config.train.seeds),
        coarse=settings.coarse,
        attempts=1 + len(settings.retry_lr),
    )


def plan_capacity(config: SweepConfig, study_dir: Path, study: Study) -> Plan:
    """What the search asks for next, given what has finished. Runs that failed wait for the next start."""
    found = collect_capacity(config, study_dir, study)
    plan, base = {}, train_base(config)
    for run in next_runs(found.search, [size.key for size in found.sizes], found.outcomes):
        point = run_point(config.capacity, base, found.size(run.size).point, run.length, run.attempt)
        seed = run.seed + RETRY_SEED * run.attempt
        plan[json.dumps(asdict(run))] = Planned(fixed={}, attributes={"point": point, "seed": seed})
    return plan


def collect_capacity(config: SweepConfig, study_dir: Path, study: Study) -> Capacity:
    """Read and judge every finished run."""
    trials = trials_of(study, TrialState.COMPLETE)
    runs = {trial.number: _run(trial.user_attrs["plan"]) for trial in trials}
    judge = criterion_of(config).judge
    judged = {
        runs[measured.number]: judge(runs[measured.number], measured, config.capacity)
        for measured in finished(study_dir, study)
        if measured.number in runs
    }
    failed = {
        _run(plan): str(trial.user_attrs.get("error", "ended without a word"))
        for plan, trial in latest(study).items()
        if trial.state == TrialState.FAIL
    }
    sizes = state_sizes(config.capacity, train_base(config))
    return Capacity(config=config, sizes=sizes, judged=judged, failed=failed)


def _run(plan: str) -> Run:
    return Run(**json.loads(plan))

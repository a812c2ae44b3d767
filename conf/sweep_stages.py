"""The settings of a sweep's parts: its stages, budget, pruner and store."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from conf.fields import option, require, require_at_least, section
from conf.objectives import Bound, Direction

Sampler = Literal["grid", "random", "qmc", "tpe", "gp"]
Stage = Literal["train", "mitigation", "confirm"]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(kw_only=True)
class BudgetConfig:
    """What a stage may spend, over all workers and starts; a trial that has begun is always finished."""

    trials: int | None = option(None, "random, qmc, tpe, gp: how many trials (mitigation: of each, a model)")
    tokens: float | None = option(None, "trained tokens; no new trial starts once they are spent or begun")
    hours: float | None = option(None, "hours of trials' work, summed over the workers; likewise")

    def check(self, where: str) -> None:
        for name in ("trials", "tokens", "hours"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{where}.{name}", value, "must be positive, or none")

    @property
    def is_open_ended(self) -> bool:
        """Trials are made as long as there are tokens or hours."""
        return self.trials is None and (self.tokens is not None or self.hours is not None)


@dataclass(kw_only=True)
class PrunerConfig:
    """Which training trials end early, judged by a validation metric at equal tokens.

    Trials are compared within a group only: equal data settings (so equal lengths and tokens a step), equal
    trainer.max_steps (so equal schedules) and equal trainer.val_every.
    """

    name: Literal["none", "median", "percentile", "halving", "hyperband"] = option("none", "the rule")
    metric: str = option("val/loss", "what it looks at, of every validation")
    direction: Direction = option("minimize", "which way metric improves")
    min_tokens: float = option(0, "no trial ends before; of halving and hyperband: the first rung")
    percentile: float = option(25.0, "percentile: the share of trials, in %, that goes on")
    startup_trials: int = option(5, "median, percentile: trials of the group that end first, unpruned")
    reduction_factor: int = option(3, "halving, hyperband: one of so many goes on to the next rung")

    def check(self, where: str) -> None:
        require_at_least(where, self, 0, "min_tokens", "startup_trials")
        require(0 < self.percentile < 100, f"{where}.percentile", self.percentile, "must lie in (0, 100)")
        require_at_least(where, self, 2, "reduction_factor")
        rungs = self.name in ("halving", "hyperband")
        remedy = f"say where the first rung of {self.name} is, e.g. a tenth of a trial's tokens"
        require(not rungs or self.min_tokens >= 1, f"{where}.min_tokens", self.min_tokens, remedy)


@dataclass(kw_only=True)
class StorageConfig:
    """Where the studies live."""

    uri: str | None = option(
        None, "postgresql://USER@HOST/DATABASE, for many nodes; none: a journal file in study_dir"
    )
    patience: float = option(600.0, "seconds to wait for a database that has gone away")

    def check(self) -> None:
        known = self.uri is None or self.uri.startswith(("postgresql://", "postgresql+psycopg://"))
        remedy = "give postgresql://USER@HOST/DATABASE, or none for a journal file in study_dir"
        require(known, "storage.uri", self.uri, remedy)
        require_at_least("storage", self, 0, "patience")


@dataclass(kw_only=True)
class TrainStageConfig:
    """One model per point of the space and seed, evaluated at and beyond its training length."""

    checkpoints: list[str] = option([], "models that are there already: evaluate these, train none")
    base: str = option("conf/train/demo.yaml", "config that every trial starts from")
    overrides: dict[str, Any] = option({}, "settings of the base to replace, by dotted name")
    space: dict[str, Any] = option({}, "dotted name -> values or range: docs/sweeps.md")
    baselines: list[dict[str, Any]] = option([], "points to try first, whatever the sampler")
    seeds: list[int] = option([0], "grid: every point with each; else in turn, unless every_seed")
    every_seed: bool = option(False, "random, qmc, tpe, gp: run every point with each seed")
    sampler: Sampler = option("grid", "grid: every point; else as many as the budget says")
    budget: BudgetConfig = section(BudgetConfig)
    pruner: PrunerConfig = section(PrunerConfig)
    metric: str = option("passkey/recent_exact_beyond", "what the sampler improves and the table calls best")
    direction: Direction = option("maximize", "which way metric improves")
    objectives: dict[str, str] = option(
        {}, "several in place of metric: name -> maximize or minimize; the report shows their Pareto front"
    )
    constraints: list[str] = option(
        [], "bounds, e.g. [peak_memory_mib <= 4000]: what breaks one is never best"
    )


@dataclass(kw_only=True)
class MitigationStageConfig:
    """Mitigations tried on the models that solve their task in length and collapse worst beyond it; on
    train.checkpoints whatever they do."""

    space: dict[str, Any] = option({}, "mitigation -> its settings -> values or range; empty skips the stage")
    checkpoints: int = option(1, "how many models to mend, the worst collapse first; 0 skips the stage")
    include_unsolved: bool = option(
        False, "mend models that have not learnt their task, too: tries the commands"
    )
    evaluate: dict[str, Any] = option({}, "evaluate settings of every trial, on top of the sweep's own")
    confirm: dict[str, Any] = option({}, "evaluate settings of the last comparison, on prompts of its own")
    sampler: Sampler = option("grid", "grid: every point; else budget.trials of each mitigation")
    budget: BudgetConfig = section(BudgetConfig)
    metric: str = option("passkey/recent_exact_beyond", "what a mitigation has to improve")
    direction: Direction = option("maximize", "which way metric improves")
    constraints: list[str] = option([], "bounds, e.g. [loss/in_length <= 2.5]: what breaks one is never best")
    max_cost: float = option(0.1, "largest loss of in-length exact match that the best setting may have")


def objectives_of(stage: TrainStageConfig | MitigationStageConfig) -> dict[str, Direction]:
    """Metric -> direction; the first is what tables sort by."""
    several = stage.objectives if isinstance(stage, TrainStageConfig) else {}
    directions = cast(dict[str, Direction], dict(several))
    return directions or {stage.metric: stage.direction}


def bounds_of(stage: TrainStageConfig | MitigationStageConfig, where: str) -> list[Bound]:
    return [Bound.parse(f"{where}.constraints", text) for text in stage.constraints]


def check_stage(where: str, stage: TrainStageConfig | MitigationStageConfig) -> None:
    """What a stage shows alone, without the configs of its trials. Raises ValueError (one line)."""
    stage.budget.check(f"{where}.budget")
    bounds_of(stage, where)
    _check_sampler(where, stage)
    if isinstance(stage, TrainStageConfig):
        seeds = stage.seeds
        require(len(seeds) == len(set(seeds)) > 0, "train.seeds", seeds, "give at least one seed, each once")
        stage.pruner.check("train.pruner")
        for name, way in stage.objectives.items():
            known = way in get_args(Direction)
            require(known, f"train.objectives.{name}", way, "choose maximize or minimize")
        count = len(stage.objectives)
        require(count != 1, "train.objectives", stage.objectives, "one objective is train.metric, direction")
        alone = stage.pruner.name == "none" or count == 0
        require(alone, "train.pruner.name", stage.pruner.name, "needs one objective: Optuna prunes no others")
        _check_every_seed(stage)
    else:
        tokens = stage.budget.tokens
        require(
            tokens is None, "mitigation.budget.tokens", tokens, "mitigations train on no tokens: use hours"
        )


def _check_sampler(where: str, stage: TrainStageConfig | MitigationStageConfig) -> None:
    if isinstance(stage, TrainStageConfig):
        remedy = "a grid tries all its points: use another sampler"
        require(stage.sampler != "grid" or not stage.baselines, "train.baselines", stage.baselines, remedy)
    budget, used = stage.budget, bool(stage.space) or isinstance(stage, TrainStageConfig)
    if stage.sampler == "grid":
        require(budget.trials is None, f"{where}.budget.trials", budget.trials, "a grid tries all its points")
        return
    remedy = f"say how many trials sampler={stage.sampler} makes, e.g. 20"
    if isinstance(stage, TrainStageConfig):
        enough = budget.trials is not None or budget.is_open_ended
        remedy += ", or give budget.tokens or budget.hours"
        conditional = [name for name, part in _leaves(stage.space) if "when" in part]
        remedy_when = f"sampler={stage.sampler} takes no conditional parts (when): use tpe or random"
        require(
            stage.sampler not in ("qmc", "gp") or not conditional, "train.space", conditional, remedy_when
        )
    else:
        enough = budget.trials is not None
        choices = f"chooses among mitigations with settings of their own: sampler={stage.sampler} cannot"
        require(stage.sampler not in ("qmc", "gp") or not used, f"{where}.sampler", stage.sampler, choices)
    require(enough or not used, f"{where}.budget.trials", budget.trials, remedy)


def _check_every_seed(stage: TrainStageConfig) -> None:
    if not stage.every_seed:
        return
    require(
        stage.sampler != "grid", "train.every_seed", True, "a grid runs every point with each seed anyway"
    )
    trials, seeds = stage.budget.trials, len(stage.seeds)
    remedy = f"must be a multiple of the {seeds} seeds: every point is run with each"
    require(trials is None or trials % seeds == 0, "train.budget.trials", trials, remedy)


def _leaves(space: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Mapping[str, Any]]]:
    """Every part of a space that is written as a mapping: ranges, and lists with conditions."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    for name, value in space.items():
        if isinstance(value, Mapping) and {"low", "high", "values"} & set(value):
            found.append((prefix + name, value))
        elif isinstance(value, Mapping):
            found += _leaves(value, f"{prefix}{name}.")
    return found

"""Every setting of a sweep: which models to train, and which mitigations to try on those that collapse.

Checked here, without torch or Optuna: every name of a space against the schema of what it sets, every point
of a grid (the extremes of a range) by building the whole config of that trial.
"""

import os
from dataclasses import dataclass
from typing import Any, Literal

from conf.capacity import (
    RETRY_SEED,
    CapacityConfig,
    check_evaluation,
    rows_for,
    run_point,
    state_sizes,
)
from conf.load import parse
from conf.measure_schema import EvaluateConfig
from conf.schema import TrackingConfig, TrainConfig, option, require, require_at_least, section
from conf.search_space import Point, Space, corners, grid, parse_space, require_inside, unfold
from conf.sweep_stages import (
    STAGES,
    MitigationStageConfig,
    Stage,
    StorageConfig,
    TrainStageConfig,
    check_stage,
    objectives_of,
)


@dataclass(kw_only=True)
class SweepConfig:
    """Many runs: train over a space, then mend what collapses."""

    name: str = option("", "names the study; letters, digits, - and _")
    study_dir: str | None = option(None, "where the study lives; none: runs/<name>")
    workers: int = option(2, "trials at a time, a process each; 0: leave them to workers elsewhere")
    threads: int | None = option(
        None, "CPU threads per trial; none: cores // workers (within SLURM, its job's)"
    )
    side_by_side: int = option(1, "passkey models that each worker trains at once, in one process")
    warm: bool = option(
        True, "evaluations start from a process that has imported and loaded what they need, not from none"
    )
    seed: int = option(0, "seed of the samplers")
    retry_failed: bool = option(True, "a new start tries failed trials once more")
    max_failures: int = option(3, "stop after this many failed trials in a row")
    budget_minutes: float | None = option(None, "stop cleanly after so long; the same command goes on")
    print_config: bool = option(False, "print the resolved config and stop")
    train: TrainStageConfig = section(TrainStageConfig)
    evaluate: dict[str, Any] = option({}, "evaluate settings for trained models, by dotted name")
    mitigation: MitigationStageConfig = section(MitigationStageConfig)
    capacity: CapacityConfig = section(CapacityConfig)
    storage: StorageConfig = section(StorageConfig)
    tracking: TrackingConfig = section(TrackingConfig)

    def __post_init__(self) -> None:
        plain = self.name.replace("-", "").replace("_", "")
        require(plain.isascii() and plain.isalnum(), "name", self.name, "use letters, digits, - and _")
        for name in ("threads", "side_by_side", "max_failures"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1")
        require(self.workers >= 0, "workers", self.workers, "must be at least 0")
        require(self.seed >= 0, "seed", self.seed, "must be at least 0")
        require_at_least("mitigation", self.mitigation, 0, "checkpoints", "max_cost")
        require(self.tracking.parent_run_id is None, "tracking.parent_run_id", "...", "a sweep makes its own")
        self.storage.check()
        check_stage("train", self.train)
        check_stage("mitigation", self.mitigation)
        minutes, together = self.budget_minutes, self.side_by_side
        require(minutes is None or minutes > 0, "budget_minutes", minutes, "must be positive, e.g. 9")
        alone = self.train.pruner.name == "none" or together == 1
        require(alone, "side_by_side", together, "trials that a pruner watches train alone: set it to 1")

    @property
    def directory(self) -> str:
        return self.study_dir or f"runs/{self.name}"

    @property
    def has_mitigation_stage(self) -> bool:
        return bool(self.mitigation.space) and self.mitigation.checkpoints > 0

    @property
    def has_capacity_stage(self) -> bool:
        """A study of capacity takes the place of the other stages."""
        return bool(self.capacity.series)

    @property
    def threads_per_trial(self) -> int:
        cores = int(os.environ.get("SLURM_CPUS_PER_TASK") or os.cpu_count() or 1)
        return self.threads or max(1, cores // max(1, self.workers))


@dataclass(kw_only=True)
class WorkerConfig:
    """One worker of a sweep that `sweeps.run` has made."""

    study: str = option("", "the study directory")
    index: int = option(0, "which worker this is; workers at one time need different ones")
    since: float | None = option(
        None, "count failures from this time on (seconds since 1970); none: from now"
    )
    wait: float = option(
        0.0, "seconds to wait for further trials; who waits conducts the stages where no sweeps.run does"
    )

    def __post_init__(self) -> None:
        require(bool(self.study), "study", "''", "give the study directory: study=DIR")
        for name in ("index", "wait"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must be at least 0")


@dataclass(kw_only=True)
class ReconcileConfig:
    """Repair a sweep whose processes were killed."""

    study: str = option("", "the study directory")

    def __post_init__(self) -> None:
        require(bool(self.study), "study", "''", "give the study directory: study=DIR")


@dataclass(kw_only=True)
class ReportConfig:
    """The report of a sweep, finished or not."""

    study: str = option("", "the study directory")

    def __post_init__(self) -> None:
        require(bool(self.study), "study", "''", "give the study directory: study=DIR")


@dataclass(kw_only=True)
class RegisterConfig:
    """The best model of a sweep, registered in MLflow."""

    study: str = option("", "the study directory")
    name: str = option("", "of the registered model; a name that exists gets a new version")
    stage: Literal["train", "confirm"] = option(
        "train", "best by what: train: the models' objective; confirm: the comparison of mitigations"
    )
    trial: int | None = option(None, "number of the training trial to register; none: the best of the stage")
    layout: Literal["hf", "ours", "state-spaces"] = option("hf", "layout of the files, as in convert")
    max_shard_size: str = option("5GB", "layout=hf: largest file of weights, e.g. 500MB")

    def __post_init__(self) -> None:
        require(bool(self.study), "study", "''", "give the study directory: study=DIR")
        require(bool(self.name), "name", "''", "give the registered model's name: name=NAME")
        taken = any(letter in self.name for letter in "/:.%\"'")
        require(not taken, "name", self.name, "must hold none of / : . % and quotes")


def train_base(config: SweepConfig) -> TrainConfig:
    """The config that every training trial starts from. Raises ValueError with the setting's name."""
    _parse("train.base", TrainConfig, [config.train.base])
    return _parse("train.overrides", TrainConfig, [config.train.base, unfold(config.train.overrides)])


def train_space(config: SweepConfig) -> Space:
    """What the training stage searches. Raises ValueError for a name or value the schema refuses."""
    space = parse_space("train.space", config.train.space, train_base(config))
    for name in ("seed", "run_dir", "tracking"):
        taken = [key for key in space if key == name or key.startswith(f"{name}.")]
        require(not taken, "train.space", taken, "belongs to the sweep; list seeds under train.seeds")
    return space


def mitigation_spaces(config: SweepConfig) -> dict[str, Space]:
    """Mitigation name -> its space, keyed by `mitigation.<setting>`."""
    spaces = {}
    for name, settings in config.mitigation.space.items():
        base = parse(EvaluateConfig, [{"checkpoint": "-"}])  # its name is checked with each point's settings
        require(name != "none", "mitigation.space", name, "is the baseline, which is always tried")
        require(
            isinstance(settings, dict),
            f"mitigation.space.{name}",
            settings,
            "needs settings, e.g. alpha_scale",
        )
        nested = {f"mitigation.{key}": value for key, value in settings.items()}
        spaces[name] = parse_space(f"mitigation.space.{name}", nested, base, prefix="mitigation.")
    return spaces


def train_baselines(config: SweepConfig) -> list[Point]:
    return [unfold(point) for point in config.train.baselines]


def train_points(config: SweepConfig) -> list[Point]:
    return grid(train_space(config))


def mitigation_points(config: SweepConfig) -> list[Point]:
    """Every point of every mitigation's grid, less the points that change nothing: those are the baseline."""
    points = []
    for name, space in mitigation_spaces(config).items():
        neutral = parse(EvaluateConfig, [{"checkpoint": "-"}]).mitigation
        for point in grid(space):
            if any(value != getattr(neutral, key.split(".")[1]) for key, value in point.items()):
                points.append({"mitigation.name": name, **point})
    return points


def evaluation(config: SweepConfig, *, stage: Stage) -> dict[str, Any]:
    """Evaluate settings of a stage, by dotted name.

    Each stage reads other prompts (seed + 0, 1, 2): models are chosen on the first, settings on the second,
    both of the validation split, and compared on the third, of the test split: no number of the last
    comparison was chosen for being high.
    """
    settings = {"split": "test" if stage == "confirm" else "validation"} | unfold(config.evaluate)
    if stage != "train":
        settings |= unfold(config.mitigation.evaluate)
    if stage == "confirm":
        settings |= unfold(config.mitigation.confirm)
    first = int(settings.get("seed", parse(EvaluateConfig, [{"checkpoint": "-"}]).seed))
    return settings | {"seed": first + STAGES.index(stage)}


def equal_tokens(config: SweepConfig, point: Point) -> Point:
    """The rows that give a step of this point train.tokens_per_step tokens, where that is set."""
    if config.train.tokens_per_step is None:
        return {}
    length = point.get("data.train_length") or train_base(config).data.train_length
    return rows_for(config.train.tokens_per_step, length)


def check(config: SweepConfig) -> None:
    """Build the config of every point (every extreme of a range); ValueError names what does not hold."""
    if config.has_capacity_stage:
        _check_capacity(config)
    else:
        _check_train_space(config)
    for stage in STAGES:
        settings = evaluation(config, stage=stage)
        for name in ("checkpoint", "run_dir", "mitigation", "bench", "tracking"):
            taken = [key for key in settings if key == name or key.startswith(f"{name}.")]
            require(not taken, "evaluate", taken, "belongs to the sweep")
        _parse("evaluate", EvaluateConfig, [{"checkpoint": "-"}, settings])
    for name, mitigation in mitigation_spaces(config).items():
        for point in grid(mitigation) if config.mitigation.sampler == "grid" else corners(mitigation):
            sources = [{"checkpoint": "-", "mitigation.name": name}, point]
            _parse(f"mitigation.space.{name}", EvaluateConfig, sources)


def _check_train_space(config: SweepConfig) -> None:
    owned = {"run_dir": None, "seed": config.train.seeds[0]}
    space = train_space(config)
    baselines = train_baselines(config)
    for point in baselines:
        require_inside("train.baselines", point, space)
    points = grid(space) if config.train.sampler == "grid" else corners(space)
    for point in [*baselines, *points]:
        sources = [
            config.train.base,
            unfold(config.train.overrides),
            point | equal_tokens(config, point) | owned,
        ]
        _parse("train.space", TrainConfig, sources)


def _check_capacity(config: SweepConfig) -> None:
    """Build the config of every size at every length, retries included."""
    train = config.train
    for name, value in (("train.space", train.space), ("train.checkpoints", train.checkpoints)):
        require(not value, name, value, "belongs to another kind of sweep than capacity.series")
    require(not config.mitigation.space, "mitigation.space", "...", "is no stage of a study of capacity")
    spread = max(train.seeds) - min(train.seeds) < RETRY_SEED
    require(spread, "train.seeds", train.seeds, f"must lie within {RETRY_SEED}: retries take those beyond")
    base = train_base(config)
    evaluate = _parse("evaluate", EvaluateConfig, [{"checkpoint": "-"}, evaluation(config, stage="train")])
    check_evaluation(config.capacity, base, evaluate, objectives_of(train))
    sizes, lengths = state_sizes(config.capacity, base), config.capacity.lengths
    runs = [(sizes[0], length, 0) for length in lengths] + [(size, lengths[0], 0) for size in sizes]
    runs += [(sizes[0], lengths[0], i + 1) for i in range(len(config.capacity.retry_lr))]
    for size, length, attempt in runs:
        point = run_point(config.capacity, base, size.point, length, attempt)
        sources = [train.base, unfold(train.overrides), point | equal_tokens(config, point)]
        _parse(f"capacity: {size.key}, length {length}", TrainConfig, sources)


def _parse(where: str, schema: type, sources: list[Any]) -> Any:
    try:
        return parse(schema, sources)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None

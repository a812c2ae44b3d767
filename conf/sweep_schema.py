"""Every setting of a sweep: which models to train, and which mitigations to try on those that collapse.

Checked here, without torch or Optuna: every name of a space against the schema of what it sets, every point
of a grid (the extremes of a range) by building the whole config of that trial.
"""

import os
from dataclasses import dataclass
from typing import Any, Literal, get_args

from conf.load import parse
from conf.schema import (
    EvaluateConfig,
    TrackingConfig,
    TrainConfig,
    option,
    require,
    require_at_least,
    section,
)
from conf.search_space import Point, Space, corners, grid, parse_space, unfold

Sampler = Literal["grid", "random", "tpe"]
Direction = Literal["maximize", "minimize"]
Stage = Literal["train", "mitigation", "confirm"]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(kw_only=True)
class TrainStageConfig:
    """One model per point of the space and seed, evaluated at and beyond its training length."""

    checkpoints: list[str] = option([], "models that are there already: evaluate these, train none")
    base: str = option("conf/train/demo.yaml", "config that every trial starts from")
    overrides: dict[str, Any] = option({}, "settings of the base to replace, by dotted name")
    space: dict[str, Any] = option({}, "dotted name -> list of values, or {low, high, log} for random, tpe")
    seeds: list[int] = option([0], "grid: every point with each; random, tpe: in turn")
    sampler: Sampler = option("grid", "grid: every point; random or tpe: `trials` of them")
    trials: int | None = option(None, "how many trials random and tpe make, over all workers")
    metric: str = option("passkey/recent_exact_beyond", "what tpe improves and the table calls best")
    direction: Direction = option("maximize", "which way metric improves")


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
    sampler: Sampler = option("grid", "grid: every point; random or tpe: `trials` of them")
    trials: int | None = option(
        None, "how many trials random and tpe make of each mitigation, on every model"
    )
    metric: str = option("passkey/recent_exact_beyond", "what a mitigation has to improve")
    direction: Direction = option("maximize", "which way metric improves")
    max_cost: float = option(0.1, "largest loss of in-length exact match that the best setting may have")


@dataclass(kw_only=True)
class SweepConfig:
    """Many runs: train over a space, then mend what collapses."""

    name: str = option("", "names the study; letters, digits, - and _")
    study_dir: str | None = option(None, "where the study lives; none: runs/<name>")
    workers: int = option(2, "trials at a time, a process each; 0: leave them to workers elsewhere")
    threads: int | None = option(
        None, "CPU threads per trial; none: cores // workers (within SLURM, its job's)"
    )
    seed: int = option(0, "seed of the samplers")
    retry_failed: bool = option(True, "a new start tries failed trials once more")
    max_failures: int = option(3, "stop after this many failed trials in a row")
    print_config: bool = option(False, "print the resolved config and stop")
    train: TrainStageConfig = section(TrainStageConfig)
    evaluate: dict[str, Any] = option({}, "evaluate settings for trained models, by dotted name")
    mitigation: MitigationStageConfig = section(MitigationStageConfig)
    tracking: TrackingConfig = section(TrackingConfig)

    def __post_init__(self) -> None:
        plain = self.name.replace("-", "").replace("_", "")
        require(plain.isascii() and plain.isalnum(), "name", self.name, "use letters, digits, - and _")
        for name in ("threads", "max_failures"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1")
        require(self.workers >= 0, "workers", self.workers, "must be at least 0")
        require(self.seed >= 0, "seed", self.seed, "must be at least 0")
        require_at_least("mitigation", self.mitigation, 0, "checkpoints", "max_cost")
        seeds = self.train.seeds
        require(len(seeds) == len(set(seeds)) > 0, "train.seeds", seeds, "give at least one seed, each once")
        require(self.tracking.parent_run_id is None, "tracking.parent_run_id", "...", "a sweep makes its own")
        for stage in ("train", "mitigation"):
            _check_budget(stage, getattr(self, stage))

    @property
    def directory(self) -> str:
        return self.study_dir or f"runs/{self.name}"

    @property
    def has_mitigation_stage(self) -> bool:
        return bool(self.mitigation.space) and self.mitigation.checkpoints > 0

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
        require(self.index >= 0, "index", self.index, "must be at least 0")
        require(self.wait >= 0, "wait", self.wait, "must be at least 0")


@dataclass(kw_only=True)
class ReportConfig:
    """The report of a sweep, finished or not."""

    study: str = option("", "the study directory")

    def __post_init__(self) -> None:
        require(bool(self.study), "study", "''", "give the study directory: study=DIR")


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
        spaces[name] = parse_space(f"mitigation.space.{name}", nested, base)
    return spaces


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


def check(config: SweepConfig) -> None:
    """Build the config of every point (every extreme of a range); ValueError names what does not hold."""
    base = {"run_dir": None, "seed": config.train.seeds[0]}
    space = train_space(config)
    for point in grid(space) if config.train.sampler == "grid" else corners(space):
        sources = [config.train.base, unfold(config.train.overrides), point | base]
        _parse("train.space", TrainConfig, sources)
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


def _parse(where: str, schema: type, sources: list[Any]) -> Any:
    try:
        return parse(schema, sources)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_budget(stage: str, config: TrainStageConfig | MitigationStageConfig) -> None:
    if config.sampler == "grid":
        require(config.trials is None, f"{stage}.trials", config.trials, "a grid tries all its points")
    elif stage == "train" or config.space:
        require(
            config.trials is not None and config.trials >= 1,
            f"{stage}.trials",
            config.trials,
            f"say how many trials sampler={config.sampler} makes, e.g. 20",
        )

"""Settings of the measurement of what a trial costs beyond its own work."""

from dataclasses import dataclass

from conf.schema import option, require


@dataclass(kw_only=True)
class SweepBenchConfig:
    """What a trial costs beyond its own work."""

    sweep: str = option("conf/sweep/smoke.yaml", "a sweep with a training and a mitigation stage")
    trials: int = option(5, "evaluations of either kind; medians are shown")
    points: int = option(10_000, "metric points logged with and without MLflow; 0: skip")
    output: str | None = option(None, "where the numbers go; none: runs/overhead-<time>.json")

    def __post_init__(self) -> None:
        require(self.trials >= 1, "trials", self.trials, "must be at least 1")
        require(self.points >= 0, "points", self.points, "must be at least 0")

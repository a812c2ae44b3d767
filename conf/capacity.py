"""Settings of a study of capacity: which state sizes, which training lengths, what counts as holding."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from conf.fields import option, require, require_at_least
from conf.load import flatten
from conf.measure_schema import EvaluateConfig
from conf.schema import ModelConfig, TrainConfig
from conf.search_space import Point, grid, parse_space, unfold

RETRY_SEED = 1000  # added to the seed by every retry: no seed of the plan is met again


@dataclass(kw_only=True)
class CapacityConfig:
    """Laws of capacity: the training length that a state size needs, and the context that it holds."""

    series: dict[str, Any] = option(
        {},
        "name -> {setting: values} (every combination) or a list of {setting: value}: the state sizes of one "
        "law; empty: no study of capacity",
    )
    lengths: list[int] = option([], "candidate training lengths; the search chooses among them")
    coarse: int = option(3, "how many of them test whether the outcome is monotone, before bisection")
    retry_lr: list[float] = option(
        [0.5, 2.0], "an unsolved run is tried again at optim.lr times these, with other seeds; then missing"
    )
    solved: float = option(0.95, "passkey: exact match at its own length below which a run is unsolved")
    holds: float = option(
        0.9, "passkey: collapse is recent exact match below this share of its in-length value anywhere"
    )
    loss_factor: float = option(
        2.0, "text: collapse is a loss above so many times its in-length maximum at any position"
    )
    recalled: float = option(0.95, "recall: exact match over all depths above this")
    resamples: int = option(200, "draws of seeds (and of prompts, in doubt) behind every interval")

    def __post_init__(self) -> None:
        lengths = self.lengths
        ascending = all(a < b for a, b in pairwise(lengths))
        require(ascending, "capacity.lengths", lengths, "give each once, ascending")
        if self.series:
            few = "give at least two training lengths, e.g. [128, 256, 512, 1024]"
            require(len(lengths) >= 2, "capacity.lengths", lengths, few)
        require_at_least("capacity", self, 2, "coarse")
        require_at_least("capacity", self, 0, "resamples")
        positive = all(factor > 0 for factor in self.retry_lr)
        require(positive, "capacity.retry_lr", self.retry_lr, "every factor must be positive, e.g. 0.5")
        remedy = "must be above 1 and finite, e.g. 2.0"
        require(1 < self.loss_factor < float("inf"), "capacity.loss_factor", self.loss_factor, remedy)
        for name in ("solved", "holds", "recalled"):
            value = getattr(self, name)
            require(0 < value < 1, f"capacity.{name}", value, "must lie between 0 and 1, e.g. 0.95")


@dataclass(frozen=True, kw_only=True)
class StateSize:
    """One state size. key: its settings in words; ssm, conv: elements of one sequence's state."""

    key: str
    point: Point
    series: tuple[str, ...]
    ssm: int
    conv: int

    @property
    def total(self) -> int:
        """As arXiv 2410.07145 counts: the convolution's last inputs too."""
        return self.ssm + self.conv


def state_sizes(config: CapacityConfig, base: TrainConfig) -> list[StateSize]:
    """Every size once, the smallest first; one that two series share belongs to both.

    Raises ValueError for a setting that the schema refuses or that belongs to the study.
    """
    points = {name: _points(name, written, base) for name, written in config.series.items()}
    varied = list(dict.fromkeys(key for series in points.values() for point in series for key in point))
    known = flatten(base)
    found: dict[str, StateSize] = {}
    for name, series in points.items():
        for point in series:
            whole = {key: point.get(key, known[key]) for key in varied}
            key = ", ".join(f"{name.rsplit('.', 1)[-1]} {value}" for name, value in whole.items())
            member_of = (*(found[key].series if key in found else ()), name)
            ssm, conv = state_elements(_model(name, whole, base))
            found[key] = StateSize(key=key, point=whole, series=member_of, ssm=ssm, conv=conv)
    return sorted(found.values(), key=lambda size: (size.total, size.key))


def state_elements(model: ModelConfig) -> tuple[int, int]:
    """Numbers in one sequence's SSM states and in its convolutions' last inputs."""
    ssm = model.n_layers * model.d_inner * model.d_state
    return ssm, model.n_layers * model.conv_dim * (model.d_conv - 1)


def run_point(config: CapacityConfig, base: TrainConfig, size: Point, length: int, attempt: int) -> Point:
    """What one run sets; a retry has another learning rate."""
    point = size | {"data.train_length": length}
    if attempt:
        point |= {"optim.lr": size.get("optim.lr", base.optim.lr) * config.retry_lr[attempt - 1]}
    return point


def check_evaluation(
    config: CapacityConfig, base: TrainConfig, evaluate: EvaluateConfig, metrics: Iterable[str]
) -> None:
    """Whether runs of this base can be judged by what is measured of them: needles of passkey models, losses
    of language models. Raises ValueError."""
    suite = "loss" if base.data.name == "documents" else "passkey"
    remedy = f"runs on data.name={base.data.name} are judged by {suite}: add it"
    require(suite in evaluate.suites, "evaluate.suites", evaluate.suites, remedy)
    for metric in metrics:
        taken = metric.startswith("passkey/") and "passkey" not in evaluate.suites
        remedy = "is not measured by these suites: e.g. train.metric=loss/max_beyond train.direction=minimize"
        require(not taken, "train.metric", metric, remedy)
    remedy = "each model is asked at 1x to 64x its own length; leave it out"
    require(not evaluate.passkey.lengths, "evaluate.passkey.lengths", evaluate.passkey.lengths, remedy)
    if suite == "loss":
        loss, longest = evaluate.loss, config.lengths[-1]
        remedy = "each model is asked to 64x its own length; leave it out, or bound it with loss.max_length"
        require(loss.length is None, "evaluate.loss.length", loss.length, remedy)
        enough = loss.max_length is None or loss.max_length >= 2 * longest
        remedy = f"must reach beyond the longest training length, to {2 * longest} at least"
        require(enough, "evaluate.loss.max_length", loss.max_length, remedy)
        remedy = "the noise between prompts tells how sure an outcome is: at least 2, better 32"
        require(loss.prompts >= 2, "evaluate.loss.prompts", loss.prompts, remedy)


def rows_for(tokens_per_step: int | None, length: int) -> Point:
    """The batch that has so many tokens at a training length; nothing where rows are given instead.

    Raises ValueError where whole rows do not add up to it.
    """
    if tokens_per_step is None:
        return {}
    rows, rest = divmod(tokens_per_step, length)
    remedy = f"must be a multiple of every training length, and is not of {length}"
    require(rest == 0 and rows > 0, "train.tokens_per_step", tokens_per_step, remedy)
    return {"data.batch_size": rows}


def _points(name: str, written: Any, base: TrainConfig) -> list[Point]:
    where = f"capacity.series.{name}"
    if isinstance(written, list):
        mappings = all(isinstance(point, Mapping) for point in written) and bool(written)
        require(mappings, where, written, "write a list of {setting: value}, or {setting: [values]}")
        points = [unfold(point) for point in written]
        for point in points:
            parse_space(where, {key: [value] for key, value in point.items()}, base)
    else:
        require(isinstance(written, Mapping), where, written, "write {setting: [values]}")
        points = grid(parse_space(where, written, base))
    for point in points:
        taken = [key for key in point if key.split(".")[0] in ("data", "seed", "run_dir", "tracking")]
        require(not taken, where, taken, "belongs to the study; a size is made of model settings")
    return points


def _model(series: str, point: Point, base: TrainConfig) -> ModelConfig:
    settings = vars(base.model) | {
        key.split(".")[1]: value for key, value in point.items() if key.startswith("model.")
    }
    try:
        return ModelConfig(**settings)
    except ValueError as error:
        raise ValueError(f"capacity.series.{series}: {error}") from None

"""What a sweep has measured, read back from its run directories: nothing here changes anything.

Three words are kept apart, as lightning_modules.evaluation.conclusion judges them: unsolved at the training
length, collapse (recent needles lost beyond it), forgetting (far needles lost where recent ones are found).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from conf.mitigation import NEUTRAL_SETTINGS
from conf.objectives import Direction
from conf.search_space import Point
from conf.sweep_schema import SweepConfig
from conf.sweep_stages import objectives_of
from sweeps.planning.budget import not_started
from sweeps.planning.samplers import point_of
from sweeps.stores.store import run_directory, stage_name
from sweeps.stores.studies import latest, trial_name, trials_of


@dataclass(frozen=True, kw_only=True)
class Share:
    """A measured exact match and its 95% interval."""

    exact: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One finished trial with its passkey evaluation (empty where another suite was run) and its losses."""

    number: int
    run_dir: Path
    point: Point
    seed: int | None
    value: float  # of the first objective
    values: dict[str, float] = field(default_factory=dict)  # of each objective
    broken: list[str] = field(default_factory=list)  # the bounds that do not hold
    seconds: float
    metrics: dict[str, float]
    train_length: int
    recent: dict[int, Share]
    recall: dict[int, Share]
    conclusion: dict[str, Any]
    loss: dict[str, Any] | None = None  # by position, as evaluation.json has it

    @property
    def in_length(self) -> float | None:
        """Exact match at the training length, needles at all depths."""
        return self.conclusion["in_length_exact"]

    @property
    def beyond(self) -> float | None:
        """Mean exact match on recent needles, from 16 times the training length on."""
        return self.metrics.get("passkey/recent_exact_beyond")

    @property
    def held(self) -> float:
        """Mean exact match on recent needles at all lengths beyond training: settles ties of what is measured
        far out, where everything may be lost."""
        beyond = [share.exact for length, share in self.recent.items() if length > self.train_length]
        return sum(beyond) / len(beyond) if beyond else 0.0

    @property
    def is_solved(self) -> bool:
        return bool(self.conclusion["solved"])

    @property
    def label(self) -> str:
        return describe(self.point, self.seed)


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A trial without a result: its last words."""

    name: str
    point: Point
    error: str


@dataclass(frozen=True, kw_only=True)
class Mended:
    """One model under its mitigations: every setting tried, and the comparison on fresh prompts."""

    model: Measured
    tried: list[Measured]
    compared: list[Measured]

    @property
    def baseline(self) -> Measured | None:
        return next((measured for measured in self.compared if mitigation(measured) == "none"), None)

    def cost(self, measured: Measured) -> float | None:
        """Exact match lost at the training length, on the comparison's prompts; None where unmeasured."""
        before = self.baseline.in_length if self.baseline else None
        return None if before is None or measured.in_length is None else before - measured.in_length


@dataclass(frozen=True, kw_only=True)
class Results:
    config: SweepConfig
    models: list[Measured]
    mended: list[Mended]
    failed: list[Failed]
    open: int
    pruned: int = 0
    unspent: int = 0  # waiting trials that the budget leaves out

    @property
    def pareto(self) -> list[Measured]:
        """Of several objectives: the models that no other beats in all, the first objective's best first."""
        objectives = objectives_of(self.config.train)
        return pareto_front(self.models, objectives) if len(objectives) > 1 else []


def collect(study_dir: Path, config: SweepConfig, studies: list[Study]) -> Results:
    """Read every study and the evaluations of its finished trials."""
    by_name = {stage_name(study): study for study in studies}
    train = by_name.get("train")
    models = finished(study_dir, train) if train else []
    mended = []
    for model in models:
        tried, compared = (by_name.get(f"{stage}-{model.number:04d}") for stage in ("mitigation", "confirm"))
        if tried:
            mended.append(
                Mended(
                    model=model,
                    tried=finished(study_dir, tried),
                    compared=finished(study_dir, compared) if compared else [],
                )
            )
    trials = [trial for study in studies for trial in trials_of(study)]
    return Results(
        config=config,
        models=models,
        mended=mended,
        failed=[failure for study in studies for failure in _failures(study)],
        open=sum(not trial.state.is_finished() for trial in trials),
        pruned=sum(trial.state == TrialState.PRUNED for trial in trials),
        unspent=sum(not_started(study, config) for study in studies),
    )


def pareto_front(models: Iterable[Measured], objectives: dict[str, Direction]) -> list[Measured]:
    """The models within the bounds that none of these is at least as good as in all, and better in one."""
    signs = {name: 1 if direction == "maximize" else -1 for name, direction in objectives.items()}
    able = [(m, [sign * m.values[name] for name, sign in signs.items()]) for m in models if not m.broken]
    front = [
        (model, ours)
        for model, ours in able
        if not any(
            theirs != ours and all(a >= b for a, b in zip(theirs, ours, strict=True)) for _, theirs in able
        )
    ]
    return [model for model, _ in sorted(front, key=lambda pair: pair[1], reverse=True)]


def finished(study_dir: Path, study: Study) -> list[Measured]:
    """The completed trials of a study, in the order of their numbers."""
    trials = trials_of(study, TrialState.COMPLETE)
    return [_read(run_directory(study_dir, study, trial.number), study, trial) for trial in trials]


def shown_seed(study: Study, trial: FrozenTrial) -> int | None:
    """The seed, where it tells trials apart."""
    seeds = {other.user_attrs.get("seed") for other in study.get_trials(deepcopy=False)}
    return trial.user_attrs["seed"] if len(seeds) > 1 else None


def worst_collapse(models: Iterable[Measured], config: SweepConfig) -> list[Measured]:
    """The models to mend: of those that have learnt their task, the ones that lose most recent needles beyond
    their training length, the worst first. Models that were given count whatever they have learnt."""
    stage = config.mitigation
    able = [m for m in models if m.beyond is not None and (m.is_solved or stage.include_unsolved)]
    if config.train.checkpoints:
        able = list(models)
    return sorted(able, key=lambda m: (m.beyond or 0.0, m.held, m.number))[: stage.checkpoints]


def best_settings(tried: list[Measured], config: SweepConfig) -> list[Measured]:
    """The best setting of each mitigation: the best value among those whose in-length cost is allowed, else
    the cheapest."""
    baseline = next((measured for measured in tried if mitigation(measured) == "none"), None)
    names = dict.fromkeys(mitigation(measured) for measured in tried if mitigation(measured) != "none")
    sign = 1 if config.mitigation.direction == "maximize" else -1
    best = []
    for name in names:
        settings = [measured for measured in tried if mitigation(measured) == name]
        settings = [measured for measured in settings if not measured.broken] or settings
        if baseline is not None and baseline.in_length is not None:
            allowed = [
                m for m in settings if baseline.in_length - (m.in_length or 0) <= config.mitigation.max_cost
            ]
            settings = allowed or [max(settings, key=lambda m: m.in_length or 0)]
        best.append(max(settings, key=lambda m: (sign * m.value, m.held)))
    return best


def table_rows(results: Results) -> list[dict[str, Any]]:
    """Every finished trial as one flat row, for results.csv; what a row lacks is left out."""
    stages = [("train", model) for model in results.models]
    for mended in results.mended:
        stages += [("mitigation", one) for one in mended.tried] + [
            ("confirm", one) for one in mended.compared
        ]
    rows = []
    for stage, one in stages:
        kept = ("in_length_exact", "solved", "collapse_length", "forgetting_length")
        row = {"stage": stage, "run_dir": str(one.run_dir), **one.point, "seed": one.seed, "value": one.value}
        row |= {"seconds": one.seconds, "train_length": one.train_length}
        row |= {name: one.conclusion[name] for name in kept}
        if len(one.values) > 1:
            row |= one.values | {"pareto": any(one is other for other in results.pareto)}
        if one.broken:
            row["broken"] = "; ".join(one.broken)
        for name, shares in (("recent", one.recent), ("recall", one.recall)):
            row |= {f"{name}_{length}": share.exact for length, share in shares.items()}
        rows.append({name: value for name, value in row.items() if value is not None})
    return rows


def mitigation(measured: Measured) -> str:
    return measured.point["mitigation.name"]


def describe(point: Point, seed: int | None = None) -> str:
    """`train_length 256, d_state 16` or `forget_more alpha_scale 0.999`: a factor of 1 is left out."""
    name = point.get("mitigation.name")
    # `initial_state.name` is called initial_state
    plain = {key.removesuffix(".name"): value for key, value in point.items() if key != "mitigation.name"}
    short = {key.rsplit(".", 1)[-1]: value for key, value in plain.items()}
    if name is not None:
        short = {key: value for key, value in short.items() if value != NEUTRAL_SETTINGS[key]}
    words = [
        f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in short.items()
    ]
    if name is not None and name not in short:  # `delta_scale 0.9` says it once
        words = [f"{name} {', '.join(words)}".strip()]
    return ", ".join(words if seed is None else [*words, f"seed {seed}"])


def _read(run_dir: Path, study: Study, trial: FrozenTrial) -> Measured:
    evaluated = run_dir / "evaluation" if study.user_attrs["stage"] == "train" else run_dir
    try:
        trained = {} if "checkpoint" in point_of(trial) else _metrics(run_dir)
        metrics = trained | _metrics(evaluated)
        evaluation = json.loads((evaluated / "evaluation.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{run_dir}: has finished, but its results cannot be read ({error})") from None
    passkey = evaluation.get("passkey") or {}
    return Measured(
        number=trial.number,
        run_dir=run_dir,
        point=point_of(trial),
        seed=shown_seed(study, trial),
        value=trial.values[0],
        values=dict(zip(study.user_attrs["objectives"], trial.values, strict=True)),
        broken=[name for name, excess in trial.constraints.items() if excess > 0],
        seconds=trial.user_attrs["seconds"],
        metrics=metrics,
        train_length=evaluation["train_length"],
        recent=_shares(passkey.get("recent", [])),
        recall=_shares(passkey.get("recall_by_length", [])),
        conclusion=evaluation["conclusion"],
        loss=evaluation.get("loss"),
    )


def _metrics(run_dir: Path) -> dict[str, float]:
    return json.loads((run_dir / "result.json").read_text())["metrics"]


def _shares(rows: list[dict[str, Any]]) -> dict[int, Share]:
    return {
        row["length"]: Share(exact=row["exact"], low=row["exact_low"], high=row["exact_high"]) for row in rows
    }


def _failures(study: Study) -> list[Failed]:
    """Planned trials that have failed and were not done again since."""
    return [
        Failed(
            name=trial_name(study, trial.number),
            point=point_of(trial),
            error=trial.user_attrs.get("error", "ended without a word"),
        )
        for trial in latest(study).values()
        if trial.state == TrialState.FAIL
    ]

"""A world in which thresholds are known: runs are judged by a law in place of a model."""

import math
from pathlib import Path

import numpy as np

from conf.capacity import run_point, state_sizes
from conf.load import parse
from conf.sweep_schema import SweepConfig, train_base
from lightning_modules.evaluation.conclusion import conclude, metrics
from lightning_modules.evaluation.passkey import wilson_interval
from sweeps.laws.capacity import Capacity, search_of
from sweeps.laws.outcomes import criterion_of
from sweeps.laws.thresholds import Run, next_runs
from sweeps.reports.results import Measured, Share

ROOT = Path(__file__).parents[3]
PROMPTS = 256
TEXT = {
    "train.base": str(ROOT / "conf" / "train" / "documents.yaml"),
    "train.metric": "loss/max_beyond",
    "train.direction": "minimize",
    "evaluate": {"suites": ["loss"], "loss.prompts": 32},
}


def study(**settings) -> SweepConfig:
    given = {
        "name": "t",
        "train.base": str(ROOT / "conf" / "train" / "demo.yaml"),
        "train.tokens_per_step": 12288,
        "train.seeds": [0, 1, 2],
        "capacity.series": {"d_state": {"model.d_state": [4, 8, 16, 32, 64, 128, 256]}},
        "capacity.lengths": [128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096],
        "capacity.resamples": 20,
    }
    return parse(SweepConfig, [given | settings])


def row(length: int, exact: float) -> dict:
    low, high = wilson_interval(exact, PROMPTS)
    return {"length": length, "exact": exact, "exact_low": low, "exact_high": high}


def measured(
    length: int,
    recent: dict[int, float],
    recall: dict[int, float],
    point=None,
    seed=0,
    number=0,
    **more: float,
) -> Measured:
    passkey = {
        "recent": [row(n, exact) for n, exact in recent.items()],
        "recall_by_length": [row(n, exact) for n, exact in recall.items()],
    }
    conclusion = conclude(length, passkey, None)

    def shares(rows: list[dict]) -> dict[int, Share]:
        return {r["length"]: Share(exact=r["exact"], low=r["exact_low"], high=r["exact_high"]) for r in rows}

    return Measured(
        number=number,
        run_dir=Path(f"capacity/trial-{number:04d}"),
        point=point or {"data.train_length": length},
        seed=seed,
        value=0.5,
        seconds=30.0,
        metrics=metrics(length, passkey, conclusion) | more,
        train_length=length,
        recent=shares(passkey["recent"]),
        recall=shares(passkey["recall_by_length"]),
        conclusion=conclusion,
    )


def losses(
    length: int, inside: list[float], beyond: list[float], error=0.02, unigram=3.0, prompts=32, **more
) -> dict:
    """What evaluation.json has of a language model: four buckets within training, then a stretch of four for
    each value. None: not finite."""
    values = [*inside, *(value for value in beyond for _ in range(4))]
    bucket = length // 4
    found = {"text": "held-out documents", "prompts": prompts, "length": bucket * len(values)}
    found |= {"unigram": unigram, "bucket": bucket, "loss": values}
    found["position"] = [bucket * i + (bucket + 1) / 2 for i in range(len(values))]
    found["error"] = [None if value is None or prompts < 2 else error for value in values]
    return found | {"non_finite": None in values} | more


def measured_text(length: int, loss: dict | None, point=None, seed=0, number=0) -> Measured:
    conclusion = conclude(length, None, loss)
    return Measured(
        number=number,
        run_dir=Path(f"capacity/trial-{number:04d}"),
        point=point or {"data.train_length": length},
        seed=seed,
        value=0.5,
        seconds=30.0,
        metrics=metrics(length, None, conclusion),
        train_length=length,
        recent={},
        recall={},
        conclusion=conclusion,
        loss=loss,
    )


class World:
    """T_forget and T_recall of N, each seed off by a log-normal factor; some first attempts are unsolved."""

    def __init__(self, config: SweepConfig, forget, recall, sigma=0.2, unsolved=0.0) -> None:
        self.config, self.forget, self.recall = config, forget, recall
        self.sigma, self.unsolved = sigma, unsolved
        self.base = train_base(config)
        self.sizes = {size.key: size for size in state_sizes(config.capacity, self.base)}

    def measure(self, run: Run, number: int = 0) -> Measured:
        size, dice = self.sizes[run.size], np.random.default_rng([len(run.size), run.seed, 7])
        n = size.total
        aside = math.exp(self.sigma * np.random.default_rng([n, run.seed]).normal())
        fails = np.random.default_rng([n, run.seed, run.length, run.attempt]).random() < self.unsolved
        reach = self.recall(n) * aside
        fails = fails or run.length > reach  # more than the state can hold
        length, inside = run.length, 0.6 if fails else 0.99 - 0.01 * dice.random()
        holds = length >= self.forget(n) * aside
        if not criterion_of(self.config).has_recall:
            far = [1.6 if holds else 1.6 + 0.1 * min(octave, 40) for octave in range(63)]
            within = [3.1] * 4 if fails else [2.4, 2.0, 1.8, 1.7]
            return measured_text(length, losses(length, within, far), size.point, run.seed, number)
        recent = {length: inside}
        for octave in range(1, 7):
            beyond = 0.98 * inside if holds else inside * max(0.0, 0.85 - 0.2 * octave)
            recent[length * 2**octave] = round(beyond * PROMPTS) / PROMPTS
        recall = {length * 2**i: inside if length * 2**i <= reach or not i else 0.7 for i in range(7)}
        recall = {at: exact for at, exact in recall.items() if at <= 16384}
        point = run_point(self.config.capacity, self.base, size.point, length, run.attempt)
        return measured(length, recent, recall, point, run.seed, number)

    def explore(self, limit: int = 10_000) -> Capacity:
        """The whole study, or its first runs."""
        judged = {}
        search, judge = search_of(self.config), criterion_of(self.config).judge
        while runs := next_runs(search, self.sizes, {run: one.outcome for run, one in judged.items()}):
            for run in runs[: limit - len(judged)]:
                judged[run] = judge(run, self.measure(run, len(judged)), self.config.capacity)
            if len(judged) == limit:
                break
        return Capacity(config=self.config, sizes=list(self.sizes.values()), judged=judged, failed={})

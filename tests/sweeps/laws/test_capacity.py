"""From measured runs to thresholds: the criterion, the counts of state, the plan that grows, equal tokens."""

import json
import math

import pytest

from conf.capacity import RETRY_SEED, rows_for, state_sizes
from conf.sweep_schema import check, equal_tokens, train_base
from sweeps.laws.capacity import plan_capacity
from sweeps.laws.outcomes import judge_needles, longest
from sweeps.laws.thresholds import Interval, Run
from sweeps.stores.store import Store
from sweeps.stores.studies import make_study
from sweeps.stores.study_dir import prepare
from tests.sweeps.laws.simulated import TEXT, World, measured, study

RUN = Run("d_state 16", 0, 256)


def judged(inside: float, beyond: list[float], recall: list[float] = (0.99, 0.5), **settings):
    recent = {256 * 2**i: exact for i, exact in enumerate([inside, *beyond])}
    depths = {256 * 2**i: exact for i, exact in enumerate(recall)}
    return judge_needles(RUN, measured(256, recent, depths), study(**settings).capacity)


def test_recent_needles_must_keep_nine_tenths_of_their_in_length_value_at_every_length():
    assert judged(1.0, [1.0, 0.95, 0.9]).outcome == "holds"
    assert judged(1.0, [1.0, 0.89, 1.0]).outcome == "collapsed"
    assert judged(0.98, [0.89, 0.883]).outcome == "holds"
    assert judged(1.0, [1.0, 0.89, 1.0], **{"capacity.holds": 0.8}).outcome == "holds"
    dip = judged(1.0, [1.0, 0.5, 1.0])
    assert (dip.worst, dip.beyond) == (1024, 0.5)


def test_a_run_below_95_in_its_own_length_is_unsolved_whatever_it_does_beyond():
    assert judged(0.94, [0.0], recall=[0.94]).outcome == "unsolved"
    assert judged(0.97, [0.97], recall=[0.94]).outcome == "unsolved", "over all depths, as in training"
    assert judged(0.94, [0.94], recall=[0.95]).outcome == "holds"


def test_doubt_is_one_half_at_the_bar_and_nothing_far_from_it():
    assert judged(1.0, [0.9]).doubt == pytest.approx(0.5, abs=0.01)
    assert judged(1.0, [0.93]).doubt == pytest.approx(0.06, abs=0.05)  # 256 prompts: sd 0.02
    assert judged(1.0, [0.2]).doubt < 1e-9
    assert judged(1.0, [0.99]).doubt < 1e-3


def test_the_longest_context_recalled_lies_in_an_interval():
    assert judged(1.0, [1.0], recall=[0.99, 0.97, 0.5, 0.97]).recalled == Interval(low=512, high=1024)
    assert judged(1.0, [1.0], recall=[0.99, 0.96]).recalled == Interval(low=512, high=math.inf)
    assert judged(1.0, [1.0], recall=[0.95, 0.9]).recalled == Interval(low=0, high=256)
    assert judged(0.5, [0.5], recall=[0.5]).recalled is None
    runs = [Interval(low=512, high=1024), Interval(low=768, high=1536), Interval(low=256, high=math.inf)]
    assert longest(runs[:2]) == Interval(low=768, high=1536)
    assert longest(runs) == Interval(low=768, high=math.inf)


def test_state_is_counted_as_the_paper_counts_it():
    """The six models of arXiv 2410.07145, table 2: SSM state alone misses the official checkpoints."""
    models = [(48, 1536), (48, 1024), (24, 768), (12, 768), (12, 512), (6, 512)]
    points = [{"model.n_layers": layers, "model.d_model": width} for layers, width in models]
    overrides = {"model.d_state": 128, "model.headdim": 64}
    config = study(**{"capacity.series": {"paper": points}, "train.overrides": overrides})
    sizes = state_sizes(config.capacity, train_base(config))
    totals = [round(size.total / 1e6, 2) for size in reversed(sizes)]
    assert totals == [19.35, 12.91, 4.85, 2.42, 1.62, 0.81]
    assert round(sizes[-1].ssm / 1e6, 2) == 18.87


def test_a_size_of_two_series_is_trained_once_and_belongs_to_both():
    series = {"n": {"model.d_state": [16, 64]}, "width": [{"model.d_model": 64}, {"model.d_model": 128}]}
    config = study(**{"capacity.series": series})
    sizes = {size.key: size.series for size in state_sizes(config.capacity, train_base(config))}
    assert sizes == {
        "d_state 16, d_model 128": ("n",),
        "d_state 64, d_model 64": ("width",),
        "d_state 64, d_model 128": ("n", "width"),
    }


def test_every_length_reads_equal_tokens():
    config = study()
    for length in config.capacity.lengths:
        rows = equal_tokens(config, {"data.train_length": length})["data.batch_size"]
        assert rows * length == 12288
    assert rows_for(None, 256) == {}
    assert equal_tokens(study(**{"train.tokens_per_step": None}), {"data.train_length": 256}) == {}


MISTAKES = {
    "train.tokens_per_step=1000": (
        {"train.tokens_per_step": 1000},
        r"train.tokens_per_step=1000: must be a multiple of every training length, and is not of 128",
    ),
    "a length the curriculum does not divide": (
        {"capacity.lengths": [128, 192]},
        r"capacity: d_state 4, length 192: data.curriculum_length=128: must divide",
    ),
    "descending lengths": ({"capacity.lengths": [256, 128]}, r"capacity.lengths=\[256, 128\]: .*ascending"),
    "one length": ({"capacity.lengths": [256]}, r"capacity.lengths=\[256\]: give at least two"),
    "a setting that is none": (
        {"capacity.series": {"a": {"model.dstate": [4]}}},
        r"capacity.series.a: model.dstate is no setting; did you mean model.d_state",
    ),
    "a setting of the study": (
        {"capacity.series": {"a": {"data.train_length": [128]}}},
        r"capacity.series.a=\['data.train_length'\]: belongs to the study",
    ),
    "a model that cannot be": (
        {"capacity.series": {"a": {"model.d_model": [100]}}},
        r"capacity.series.a: model.headdim=32: must divide",
    ),
    "a series of numbers": (
        {"capacity.series": {"a": [1, 2]}},
        r"capacity.series.a=\[1, 2\]: write a list of",
    ),
    "another space": (
        {"train.space": {"optim.lr": [1e-3]}},
        r"train.space=.*belongs to another kind of sweep",
    ),
    "lengths of prompts": (
        {"evaluate": {"passkey.lengths": [512]}},
        r"evaluate.passkey.lengths=.*leave it out",
    ),
    "no passkey": ({"evaluate": {"suites": ["loss"]}}, r"evaluate.suites=\['loss'\]: .*passkey"),
    "text without losses": (
        {**TEXT, "evaluate": {"suites": ["states"]}},
        r"evaluate.suites=\['states'\]: runs on data.name=documents are judged by loss: add it",
    ),
    "text and a metric of needles": (
        {**TEXT, "train.metric": "passkey/recent_exact_beyond"},
        r"train.metric=passkey/recent_exact_beyond: is not measured .*train.metric=loss/max_beyond",
    ),
    "prompts no longer than training": (
        {**TEXT, "evaluate": {"suites": ["loss"], "loss.max_length": 4096}},
        r"evaluate.loss.max_length=4096: must reach .* to 8192 at least",
    ),
    "length of prompts": (
        {**TEXT, "evaluate": {"suites": ["loss"], "loss.length": 4096}},
        r"evaluate.loss.length=4096: .*bound it with loss.max_length",
    ),
    "one prompt": (
        {**TEXT, "evaluate": {"suites": ["loss"], "loss.prompts": 1}},
        r"evaluate.loss.prompts=1: the noise between prompts",
    ),
    "a bar below the maximum": ({"capacity.loss_factor": 0.9}, r"capacity.loss_factor=0.9: must be above 1"),
    "no bar": ({"capacity.loss_factor": float("inf")}, r"capacity.loss_factor=inf: must be above 1 and fin"),
    "seeds far apart": ({"train.seeds": [0, 1000]}, r"train.seeds=\[0, 1000\]: must lie within 1000"),
    "a budget of nothing": ({"budget_minutes": 0}, r"budget_minutes=0.0: must be positive"),
}


@pytest.mark.parametrize(("settings", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_in_one_line(settings, message):
    with pytest.raises(ValueError, match=rf"\A{message}[^\n]*\Z"):
        check(study(**settings))


def test_the_plan_begins_with_the_coarse_test_of_every_size_and_seed(tmp_path):
    config = study(study_dir=str(tmp_path))
    store = Store(prepare(config), config, create=True)
    plan = plan_capacity(config, tmp_path, make_study(store, "capacity", {"m": "maximize"}, stage="train"))
    assert len(plan) == 7 * 3 * 3
    first = plan[json.dumps({"size": "d_state 4", "seed": 0, "length": 128, "attempt": 0})]
    assert first.attributes == {"point": {"model.d_state": 4, "data.train_length": 128}, "seed": 0}


def test_retries_have_another_seed_and_learning_rate(tmp_path, monkeypatch):
    config = study(**{"capacity.series": {"a": {"model.d_state": [4]}}})
    found = World(config, lambda n: 0, lambda n: 0).explore(limit=9)  # nothing can be solved
    monkeypatch.setattr("sweeps.laws.capacity.collect_capacity", lambda *_: found)
    plan = plan_capacity(config, tmp_path, None)
    assert {planned.attributes["seed"] for planned in plan.values()} == {RETRY_SEED + i for i in range(3)}
    assert {planned.attributes["point"]["optim.lr"] for planned in plan.values()} == {4e-3 * 0.5}


def test_a_study_finds_the_thresholds_of_its_world():
    config = study(**{"capacity.resamples": 0})
    found = World(config, lambda n: 0.03 * n + 150, lambda n: 1e9, sigma=0.05, unsolved=0.1).explore()
    assert found.is_complete
    for size in found.sizes:
        for seed in config.train.seeds:
            interval = found.forget(size.key, seed)
            assert interval is not None
            assert interval.low * 0.8 < 0.03 * size.total + 150 < interval.high * 1.25
    # tests of monotonicity, halvings and retries: two thirds of a blind grid without retries
    assert len(found.judged) < 0.66 * len(found.sizes) * 10 * 3
    law = found.law("forget", "d_state", "total").fit("linear")
    assert law is not None
    assert law.parameters[0] / law.scale == pytest.approx(0.03, rel=0.3)

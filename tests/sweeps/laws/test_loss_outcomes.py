"""The criterion of language models on constructed evaluations, and a study of them in a simulated world."""

import io

import pytest
from rich.console import Console

from sweeps.laws.outcomes import LOSS, NEEDLES, criterion_of, judge_loss
from sweeps.laws.report import report_found
from sweeps.laws.thresholds import Run
from tests.sweeps.laws.simulated import TEXT, World, losses, measured_text, study

RUN = Run("d_state 16", 0, 256)
INSIDE = [2.5, 2.0, 1.8, 1.7]  # the bar is 5.0, the mean 2.0


def judged(beyond: list[float | None], inside=INSIDE, **loss):
    settings = study().capacity
    return judge_loss(RUN, measured_text(256, losses(256, inside, beyond, **loss)), settings)


def test_the_criterion_is_chosen_by_what_the_base_trains():
    assert criterion_of(study()) is NEEDLES
    assert criterion_of(study(**TEXT)) is LOSS


def test_loss_must_stay_within_twice_its_in_length_maximum_at_every_position():
    assert judged([1.7, 4.0, 4.99]).outcome == "holds"
    found = judged([1.7, 5.01, 1.7])
    assert (found.outcome, found.beyond, found.inside, found.in_length) == ("collapsed", 5.01, 2.5, 2.0)
    assert 512 < found.worst < 768, "the second stretch beyond"
    assert found.kept == pytest.approx(2.5 / 5.01)
    assert found.reach == 1024
    assert judged([1.7, None, 1.7]).outcome == "collapsed", "a loss that is not finite"
    assert judged([1.7, 2.9]).kept == pytest.approx(2.5 / 2.9)
    assert judged([1.7]).recalled is None


def test_one_hard_passage_is_no_collapse():
    """Beyond training the means of whole stretches count, as for the suite's own conclusion."""
    loss = losses(256, INSIDE, [1.7, 1.7])
    loss["loss"][5] = 9.0
    found = judge_loss(RUN, measured_text(256, loss), study().capacity)
    assert found.outcome == "holds"
    assert found.beyond == pytest.approx((3 * 1.7 + 9.0) / 4)
    loss["loss"][6] = 9.0
    assert judge_loss(RUN, measured_text(256, loss), study().capacity).outcome == "collapsed"


def test_the_bar_is_a_setting():
    settings = study(**{"capacity.loss_factor": 1.1}).capacity
    measured = measured_text(256, losses(256, INSIDE, [2.6, 2.8]))
    assert judge_loss(RUN, measured, settings).outcome == "collapsed"


def test_a_run_that_is_no_better_than_token_frequencies_is_unsolved_whatever_it_does_beyond():
    assert judged([9.0], unigram=2.01).outcome == "collapsed"
    for beyond in (1.0, 9.0):
        found = judged([beyond], unigram=2.0)
        assert (found.outcome, found.doubt, found.kept) == ("unsolved", 0.0, 0.0)
    assert judged([1.0], inside=[None, 2.0, 1.8, 1.7]).outcome == "unsolved"


def test_doubt_comes_from_the_noise_between_prompts():
    assert judged([5.0]).doubt == pytest.approx(0.5)
    assert judged([5.0 + 0.05]).doubt == pytest.approx(0.132, abs=0.01)  # sd hypot(0.02, 2 * 0.02) = 0.045
    assert judged([5.0 + 0.05], error=0.2).doubt == pytest.approx(0.456, abs=0.01)
    assert judged([1.7]).doubt < 1e-9
    assert judged([None]).doubt == 0


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (None, "no losses of several prompts"),
        (losses(256, INSIDE, [1.0], prompts=1), "no losses of several prompts"),
        (losses(256, INSIDE, [1.0], unigram=None), "no losses of several prompts"),
        (losses(256, INSIDE, []), "no losses beyond 256 tokens were measured: too little text"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_one_line(loss, message):
    with pytest.raises(ValueError, match=rf"\Acapacity/trial-0000: {message}[^\n]*\Z"):
        judge_loss(RUN, measured_text(256, loss), study().capacity)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    config = study(**TEXT, **{"capacity.resamples": 2})
    world = World(config, lambda n: 0.01 * n + 150, lambda n: 1e9, sigma=0.05, unsolved=0.1)
    found = world.explore()
    return found, report_found(found, tmp_path_factory.mktemp("figures"))


def test_a_study_finds_the_thresholds_of_its_world_and_no_law_of_recall(report):
    found, _ = report
    assert found.is_complete
    assert found.kinds == ("forget",)
    for size in found.sizes:
        for seed in found.search.seeds:
            interval = found.forget(size.key, seed)
            assert interval is not None
            assert interval.low * 0.8 < 0.01 * size.total + 150 < interval.high * 1.25


def test_its_report_speaks_of_loss_alone(report):
    _, written = report
    output = io.StringIO()
    for block in written.blocks:
        Console(width=200, file=output).print(block)
    said = output.getvalue()
    assert "T_recall does not apply: language models are asked for no needle." in said
    assert "loss beyond the training length above 2 times its maximum within" in said
    assert "Asked to 64 times the training length at least." in said
    assert "T_forget of d_state, N: SSM and convolution state" in said
    assert "T_recall of" not in said
    names = [path.stem for path, _ in written.figures]
    expected = ["surface-d_state", "laws-d_state", "residuals-d_state"]
    assert names == [*expected, "importances", "parallel_coordinates"]
    row = written.rows[0]
    assert {"in_length_loss", "in_length_max_loss", "worst_loss", "asked_to", "unigram_loss"} <= set(row)
    assert not any("exact" in name or "recent" in name for name in row)
    assert {one["outcome"] for one in written.rows} == {"holds", "collapsed", "unsolved"}


def test_prompts_that_end_early_are_said(tmp_path):
    config = study(**TEXT, **{"capacity.resamples": 0, "capacity.series": {"a": {"model.d_state": [16]}}})
    found = World(config, lambda n: 150, lambda n: 1e9).explore(limit=1)
    (run,) = found.judged
    short = measured_text(run.length, losses(run.length, INSIDE, [1.7] * 7))
    found.judged[run] = judge_loss(run, short, config.capacity)
    output = io.StringIO()
    for block in report_found(found, tmp_path).blocks:
        Console(width=200, file=output).print(block)
    assert "Asked to 8 times the training length at least: the text or evaluate.loss.max_length ends" in (
        output.getvalue()
    )

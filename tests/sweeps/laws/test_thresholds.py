"""The search against simulated worlds: what it finds, what it spends, and that it always ends."""

import math
import random
from collections.abc import Callable

import pytest

from sweeps.laws.thresholds import Interval, Outcome, Run, Search, interval, next_runs, settle

LENGTHS = tuple(round(128 * 2 ** (i / 4)) for i in range(25))  # 128 to 8,192, four an octave
SEARCH = Search(lengths=LENGTHS, seeds=(0, 1, 2), coarse=3, attempts=3)
World = Callable[[Run], Outcome]


def explore(
    world: World, search: Search = SEARCH, sizes: tuple[str, ...] = ("n",), order: random.Random | None = None
) -> dict[Run, Outcome]:
    """Run the search to its end; with `order`, runs end one at a time, in any order."""
    outcomes: dict[Run, Outcome] = {}
    while runs := next_runs(search, sizes, outcomes):
        assert not set(runs) & set(outcomes), "a run that has an outcome was proposed"
        assert len(runs) == len(set(runs))
        for run in runs if order is None else [order.choice(runs)]:
            outcomes[run] = world(run)
        assert len(outcomes) < 10_000
    return outcomes


def found(outcomes: dict[Run, Outcome], seed: int = 0, size: str = "n", search: Search = SEARCH):
    return interval(settle(search, size, seed, outcomes)[0])


def step(threshold: float) -> World:
    return lambda run: "holds" if run.length >= threshold else "collapsed"


@pytest.mark.parametrize("threshold", [129, 200, 256, 700, 1024, 1025, 3000, 8192])
def test_a_sharp_threshold_is_bracketed_by_neighbours(threshold):
    outcomes = explore(step(threshold))
    for seed in SEARCH.seeds:
        got = found(outcomes, seed)
        assert got.low < threshold <= got.high
        assert LENGTHS.index(got.high) - LENGTHS.index(got.low) == 1
        assert got.monotone
    blind = len(LENGTHS) * len(SEARCH.seeds)
    assert len(outcomes) <= 3 * (3 + math.ceil(math.log2(12)))  # the test, then halvings of 12 steps
    assert len(outcomes) < 0.3 * blind


def test_it_spends_a_third_of_a_blind_grid_over_many_worlds():
    spent = [len(explore(step(128 * 64 ** (i / 40)))) for i in range(41)]
    assert max(spent) <= 21
    assert sum(spent) / len(spent) < 0.28 * 75


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [("collapsed", Interval(low=8192, high=math.inf)), ("holds", Interval(low=0, high=128))],
)
def test_outside_the_range_it_is_censored_at_the_cost_of_the_coarse_test(outcome, expected):
    outcomes = explore(lambda run: outcome)
    assert found(outcomes) == expected
    assert found(outcomes).is_censored
    assert len(outcomes) == 9


@pytest.mark.parametrize("coarse", [3, 9])
def test_a_noisy_world_ends_and_brackets_where_the_odds_turn(coarse):
    generator = random.Random(0)
    inside, spent, flagged = [], [], 0

    def world(run: Run) -> Outcome:
        odds = 1 / (1 + math.exp(-4 * math.log2(run.length / 1000)))  # even at 1,000, 0.98 an octave on
        return "holds" if generator.random() < odds else "collapsed"

    for _ in range(200):
        outcomes = explore(world, Search(lengths=LENGTHS, seeds=(0,), coarse=coarse))
        got = found(outcomes)
        inside.append(got.low / 2 <= 1000 <= got.high * 2)
        spent.append(len(outcomes))
        flagged += not got.monotone
    assert sum(inside) >= 190
    assert max(spent) < len(LENGTHS)
    assert sum(spent) / len(spent) < coarse + 5
    # Halvings narrow a bracket and can contradict nothing: only the coarse test finds what is not monotone.
    assert flagged == 0 if coarse == 3 else 1 <= flagged < 40


def test_where_the_outcome_is_not_monotone_both_ends_are_sought_and_the_interval_says_so():
    def world(run: Run) -> Outcome:  # holds from 300, fails again from 1,000 to 2,500
        return "holds" if 300 <= run.length < 1000 or run.length > 2500 else "collapsed"

    outcomes = explore(world)
    got = found(outcomes)
    lower = max(n for n in LENGTHS if n < 300)
    upper = min(n for n in LENGTHS if n > 2500)
    # 1,024 is among the coarse lengths and shows a collapse; the dip's lower end is never looked for
    assert (got.low, got.high) in {(lower, upper), (max(n for n in LENGTHS if n <= 2500), upper)}

    wide = Search(lengths=LENGTHS, seeds=(0,), coarse=7)
    outcomes = explore(world, wide)
    got = found(outcomes, search=wide)
    assert got == Interval(low=lower, high=upper, monotone=False)
    assert len(outcomes) < len(LENGTHS)


def test_a_reversed_world_is_censored_at_both_ends():
    got = found(explore(lambda run: "holds" if run.length < 1000 else "collapsed"))
    assert got == Interval(low=0, high=math.inf, monotone=False)


def test_an_unsolved_run_is_tried_again_and_never_counts_as_collapsed():
    def world(run: Run) -> Outcome:
        if run.length > 1500 and run.attempt < 1:
            return "unsolved"
        return "holds" if run.length >= 700 else "collapsed"

    outcomes = explore(world)
    got = found(outcomes)
    assert got.low < 700 <= got.high
    assert got.monotone
    assert {run.attempt for run in outcomes if run.length > 1500} == {0, 1}
    assert {run.attempt for run in outcomes if run.length < 1500} == {0}


def test_a_length_that_is_never_solved_is_missing_and_its_neighbours_are_tried():
    def world(run: Run) -> Outcome:  # long rows are not learned; those that are collapse
        return "unsolved" if run.length > 3000 else "collapsed"

    outcomes = explore(world)
    known, pending = settle(SEARCH, "n", 0, outcomes)
    assert not pending
    assert known[8192] == "missing"
    longest = max(n for n in LENGTHS if n <= 3000)
    assert interval(known) == Interval(low=longest, high=math.inf)
    assert sum(run.length == 8192 for run in outcomes) == 3 * 3  # three attempts for each seed
    assert len({run.length for run in outcomes if run.length > 3000}) < 4  # halved, not tried one by one


def test_nothing_solved_anywhere_says_nothing():
    outcomes = explore(lambda run: "unsolved")
    assert found(outcomes) is None
    assert len(outcomes) == len(LENGTHS) * 9


def test_the_order_in_which_runs_end_changes_nothing():
    def world(run: Run) -> Outcome:  # fixed noise: a function of the run alone
        generator = random.Random(repr(run))
        if generator.random() < 0.15:
            return "unsolved"
        return "holds" if run.length * 2 ** generator.gauss(0, 1) > 900 else "collapsed"

    expected = explore(world, sizes=("a", "b"))
    for seed in range(10):
        assert explore(world, sizes=("a", "b"), order=random.Random(seed)) == expected


def test_the_coarse_lengths_are_both_ends_and_even_steps_between():
    assert SEARCH.test_lengths == (128, 1024, 8192)
    assert Search(lengths=(128, 256), seeds=(0,), coarse=5).test_lengths == (128, 256)
    assert Search(lengths=(128, 256, 384, 512), seeds=(0,), coarse=3).test_lengths == (128, 256, 512)

"""The report of a simulated study: words, figures and one page that needs nothing else."""

import io
import re

import pytest
from rich.console import Console

from sweeps.laws.factorial import Factorial, render, write_figure
from sweeps.laws.importance import eta_squared
from sweeps.laws.report import Report, report_found
from sweeps.reports import page
from sweeps.reports.results import Results
from tests.sweeps.laws.simulated import World, measured, study


def text(blocks) -> str:
    output = io.StringIO()
    console = Console(width=160, file=output)
    for block in blocks:
        console.print(block)
    return output.getvalue()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Report:
    config = study(**{"capacity.resamples": 2})
    world = World(config, lambda n: 0.03 * n + 150, lambda n: 900 * 2 ** (n / 20_000), unsolved=0.1)
    return report_found(world.explore(), tmp_path_factory.mktemp("figures"))


def test_words_name_thresholds_laws_verdicts_and_the_paper(report):
    said = text(report.blocks)
    assert "The search has ended" in said
    assert re.search(r"d_state 64 .* 17,536 .* 16,384 .* 1,152 .* 512-768", said)
    assert re.search(r">\d,\d+", said), "the largest state recalls more than was asked"
    for form in ("linear: T = a N + b", "exponential: T = a (e^(k N) - 1) / k + c", "power", "constant"):
        assert form in said
    assert said.count("N: SSM state alone:") == 2
    assert "5.172 N - 4.469" in said
    assert re.search(r"12,288 .* 1,200 .* 14,745,600 .* 400 steps at 128", said), "the curriculum is recorded"


def test_every_figure_is_there_and_inside_the_page(report):
    names = [path.stem for path, _ in report.figures]
    assert names == [
        *("surface-d_state", "laws-d_state", "residuals-d_state"),
        *("importances", "parallel_coordinates"),
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path, _ in report.figures)
    parts = [page.figure(path, caption) for path, caption in report.figures]
    html = page.page("A <study>", [page.text_block(text(report.blocks)), *parts, page.table(report.rows)])
    assert html.count("data:image/png;base64,") == len(names)
    assert "A &lt;study&gt;" in html
    assert not re.search(r"(src|href)=\"(?!data:)|<script|@import|url\(", html)
    assert html.count("<tr>") == len(report.rows) + 1


def test_rows_hold_what_decided(report):
    row = report.rows[0]
    assert {"size", "n_total", "n_ssm", "train_length", "seed", "outcome", "worst_recent", "doubt"} <= set(
        row
    )
    assert {row["outcome"] for row in report.rows} == {"holds", "collapsed", "unsolved"}


def test_a_study_without_results_or_with_few_has_a_report(tmp_path):
    config = study(**{"capacity.resamples": 2})
    world = World(config, lambda n: 0.03 * n + 150, lambda n: 1e6)
    assert "The search goes on: 0 runs" in text(report_found(world.explore(limit=0), tmp_path).blocks)
    nothing = World(config, lambda n: 150, lambda n: 0).explore(limit=5)
    few = report_found(nothing, tmp_path)
    assert "not distinguishable: 0 state sizes" in text(few.blocks)
    assert [path.stem for path, _ in few.figures] == ["surface-d_state"]


def test_eta_squared_is_the_share_between_groups():
    assert eta_squared([1, 1, 2, 2], [0.0, 0.0, 1.0, 1.0]) == pytest.approx(1)
    assert eta_squared([1, 2, 1, 2], [0.0, 0.0, 1.0, 1.0]) == pytest.approx(0)
    assert eta_squared([1, 1, 2, 2], [0.0, 1.0, 1.0, 2.0]) == pytest.approx(0.5)
    assert eta_squared([1, 2], [0.5, 0.5]) == 0


def factorial(cure: bool) -> Results:
    """Passed states hold at every length; zero only from 1,024 tokens. Seed 2 of fitted noise is unsolved."""
    models = []
    for seed in range(3):
        for n in (16, 64):
            for length in (256, 1024):
                for state in ("zero", "passed", "fitted_noise"):
                    holds = length == 1024 or (cure and state == "passed")
                    inside = 0.4 if state == "fitted_noise" and seed == 2 else 1.0
                    beyond = inside * (0.95 if holds else 0.1 + 0.1 * seed)
                    recent = {length * f: inside if f == 1 else beyond for f in (1, 4, 16, 64)}
                    point = {"data.train_length": length, "initial_state.name": state, "model.d_state": n}
                    states = {"states/rms_growth_max": 1.5 if holds else 8.0, "states/retention_max": 0.7}
                    models.append(measured(length, recent, {length: inside}, point, seed, **states))
    config = study(**{"capacity.series": {}, "capacity.lengths": []})
    return Results(config=config, models=models, mended=[], failed=[], open=0)


def test_the_factorial_says_what_states_and_length_do(tmp_path):
    found = Factorial.of(factorial(cure=True))
    assert found is not None
    said = text(render(found))
    assert re.search(
        r"passed in place of zero: recent exact match at 64x \+0.3[78] \[\+0.3\d, \+0.4\d\], 4 of 4", said
    )
    assert "length 1,024 in place of 256, zero: recent exact match at 64x +0.75" in said
    assert "length 1,024 in place of 256, passed: recent exact match at 64x +0.00" in said
    assert re.search(r"d_state 16 .* 256 .* fitted_noise .* 2/3 .* 1.00 .* 0.15 \(0.10-0.20\)", said)
    assert "8.00" in said
    assert write_figure(found, tmp_path).read_bytes().startswith(b"\x89PNG")


def test_where_states_change_nothing_it_says_so_and_other_sweeps_are_no_factorial():
    found = Factorial.of(factorial(cure=False))
    assert found is not None
    assert "passed in place of zero: recent exact match at 64x +0.00 [-0." in text(render(found))
    results = factorial(cure=True)
    alike = [m for m in results.models if m.point["initial_state.name"] == "zero"]
    assert Factorial.of(Results(config=results.config, models=alike, mended=[], failed=[], open=0)) is None

"""A study of capacity as rich tables and plain sentences."""

import math

from rich.console import RenderableType
from rich.table import Table

from conf.sweep_schema import equal_tokens, train_base
from sweeps.laws.capacity import COUNTS, Capacity, Count
from sweeps.laws.figures import TITLES, Laws
from sweeps.laws.fits import Fit, Law
from sweeps.laws.forms import PAPER, K, M
from sweeps.laws.thresholds import Interval


def render(found: Capacity, laws: dict[str, Laws]) -> list[RenderableType]:
    """Sizes and thresholds, laws, lengths; runs are in the page and in results.csv."""
    blocks: list[RenderableType] = [summary(found), thresholds_table(found), legend(found)]
    blocks.append(lengths_table(found))
    for series in found.series:
        blocks += law_blocks(series, laws[series])
    blocks.append(resamples_line(found))
    if found.failed:
        blocks.append(f"Failed runs: {len(found.failed)} (the same command tries them again)")
        blocks += [
            f"  {run.size}, length {run.length}, seed {run.seed}: {why}" for run, why in found.failed.items()
        ]
    return blocks


LEGEND = """\
T_forget: the shortest training length without collapse lies in (low, high]; <: at most; >: more than.
{recall}
~: the outcome was not monotone in the length, the interval spans the dispute. -: no run has been solved."""
RECALL = "T_recall: the longest context recalled lies in [low, high), the maximum over training lengths."
NO_RECALL = "T_recall does not apply: language models are asked for no needle."


def legend(found: Capacity) -> str:
    if found.criterion.has_recall:
        return LEGEND.format(recall=RECALL)
    factor = found.config.capacity.loss_factor
    said = f"Collapse: loss beyond the training length above {factor:g} times its maximum within."
    if found.judged:
        least = min(judged.reach / run.length for run, judged in found.judged.items())
        said += f" Asked to {least:.3g} times the training length at least"
        said += "." if least >= 64 else ": the text or evaluate.loss.max_length ends there."
    return f"{LEGEND.format(recall=NO_RECALL)}\n{said}"


def summary(found: Capacity) -> str:
    """How far the search is and what it has spent, against a blind grid of the same resolution."""
    runs, search = len(found.judged), found.search
    blind = len(found.sizes) * len(search.lengths) * len(search.seeds)
    outcomes = list(found.outcomes.values())
    counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("holds", "collapsed", "unsolved"))
    state = "The search has ended" if found.is_complete else "The search goes on"
    doubtful = sum(j.doubt > 0.05 for j in found.judged.values() if j.outcome != "unsolved")
    return (
        f"{state}: {runs} runs ({counts}) of {len(found.sizes)} state sizes; a blind grid has {blind} "
        f"and its retries. In doubt, where fresh prompts would turn more than 1 in 20: {doubtful}."
    )


def thresholds_table(found: Capacity) -> Table:
    table = Table(title="Thresholds, one for each seed", title_justify="left")
    laws = [TITLES[kind] for kind in found.kinds]
    for heading in ("state size", "N_S", "SSM", "conv", *laws):
        table.add_column(heading, justify="left" if heading in ("state size", *laws) else "right")
    for size in found.sizes:
        seeds = found.search.seeds
        known = [[found.threshold(kind, size.key, seed) for seed in seeds] for kind in found.kinds]
        cells = ["  ".join(map(show_interval, one)) for one in known]
        table.add_row(size.key, f"{size.total:,}", f"{size.ssm:,}", f"{size.conv:,}", *cells)
    return table


def lengths_table(found: Capacity) -> Table:
    """What one run at each length reads: equal tokens, or equal steps."""
    config = found.config
    kind = "equal tokens and equal steps" if config.train.tokens_per_step else "equal steps, tokens grow"
    table = Table(title=f"Training at each length ({kind})", title_justify="left")
    for heading in ("length", "rows a step", "tokens a step", "steps", "tokens", "curriculum"):
        table.add_column(heading, justify="right")
    base = train_base(config)
    for length in found.search.lengths:
        rows = equal_tokens(config, {"data.train_length": length}).get(
            "data.batch_size", base.data.batch_size
        )
        steps, short = base.trainer.max_steps, base.data.curriculum_steps
        curriculum = f"{short} steps at {base.data.curriculum_length}" if short else "none"
        numbers = (length, rows, rows * length, steps, rows * length * steps)
        table.add_row(*(f"{number:,}" for number in numbers), curriculum)
    return table


def law_table(title: str, law: Law) -> Table:
    """Every form: parameters in tokens and elements, scatter, AICc, and how often it is the best."""
    table = Table(title=title, title_justify="left")
    for heading in ("form", "parameters [95% interval]", "scatter, octaves", "AICc", "best in"):
        table.add_column(heading, justify="left" if heading[:4] in ("form", "para") else "right")
    for fit in law.fits:
        won = law.wins.get(fit.form.name)
        scatter, share = f"{fit.sigma / math.log(2):.2f}", "" if won is None else f"{won:.0%}"
        table.add_row(
            f"{fit.form.name}: {fit.form.words}", parameters(fit, law), scatter, f"{fit.aicc:.1f}", share
        )
    return table


def resamples_line(found: Capacity) -> str:
    count = found.config.capacity.resamples
    return (
        f"Intervals: 95%, of {count} resamples (capacity.resamples)"
        if count
        else "No intervals: capacity.resamples=0"
    )


def law_blocks(series: str, laws: Laws) -> list[RenderableType]:
    """Each law's fits and what may be concluded; the paper's form in the paper's units."""
    blocks: list[RenderableType] = []
    for (kind, count), law in laws.items():
        title = f"{TITLES[kind]} of {series}, N: {COUNTS[count]} (tokens, elements)"
        if law.fits:
            blocks.append(law_table(title, law))
        blocks.append(f"{title.removesuffix(' (tokens, elements)')}: {law.verdict}")
        line = law.fit("linear")
        if (kind, count) == ("forget", "total") and line is not None:
            slope, intercept = line.parameters[0] / line.scale * M / K, line.parameters[1] / K
            ours = f"T = {slope:.4g} N {intercept:+.4g}"
            blocks.append(
                f"The line in K tokens and M elements: {ours}; arXiv 2410.07145: {PAPER[kind].words}"
            )
    return blocks


def parameters(fit: Fit, law: Law) -> str:
    """In tokens and elements: a form's parameters belong to N over `fit.scale`."""
    intervals = law.parameter_intervals(fit.form.name)
    cells = []
    for i, (name, value) in enumerate(zip(fit.form.parameters, fit.parameters, strict=True)):
        factor, suffix = _unit(fit.form.name, name, fit.scale)
        text = f"{name} {value * factor:.4g}"
        if intervals is not None:
            low, high = (end * factor for end in intervals[i])
            text += f" [{low:.3g}, {high:.3g}]"
        cells.append(text + suffix)
    return ", ".join(cells)


def _unit(form: str, parameter: str, scale: float) -> tuple[float, str]:
    """The factor that turns a parameter of N / scale into one of N, or the N at which it is given."""
    if (form, parameter) in (
        ("proportional", "a"),
        ("linear", "a"),
        ("exponential", "a"),
        ("exponential", "k"),
    ):
        return 1 / scale, ""
    if (
        form in ("logarithmic", "power")
        and parameter in ("a", "b")
        and (form, parameter) != ("logarithmic", "a")
    ):
        return 1.0, f" (at N = {scale:,.0f})"
    return 1.0, ""


def show_interval(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    mark = "" if interval.monotone else "~"
    if interval.low == 0 and math.isinf(interval.high):
        return f"{mark}anything"
    if interval.low == 0:
        return f"{mark}<{interval.high:,.0f}"
    if math.isinf(interval.high):
        return f"{mark}>{interval.low:,.0f}"
    return f"{mark}{interval.low:,.0f}-{interval.high:,.0f}"


def all_laws(found: Capacity, counts: tuple[Count, ...] = ("total", "ssm")) -> dict[str, Laws]:
    """Series -> law by kind and count. The slow part of a report."""
    return {
        series: {(kind, count): found.law(kind, series, count) for kind in found.kinds for count in counts}
        for series in found.series
    }

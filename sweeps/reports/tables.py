"""The report of a sweep as rich tables and plain sentences."""

from collections.abc import Callable, Sequence

from rich.console import RenderableType
from rich.table import Table

from conf.sweep_stages import objectives_of
from lightning_modules.evaluation.conclusion import LOST, SOLVED
from lightning_modules.figures import short_number
from sweeps.reports.results import Measured, Mended, Results, Share, mitigation, worst_collapse

LEGEND = f"""\
unsolved: exact match below {SOLVED:g} at its own training length; nothing more can be said of such a model.
collapse: at most {LOST:g} on needles within the last training length, because of what came before them.
forgetting: at most {LOST:g} on needles at all depths where recent ones are found; a limit of capacity.
(brackets): a prompt no longer than the training length."""


def render(results: Results) -> list[RenderableType]:
    """The tables and sentences of the report, in order."""
    blocks: list[RenderableType] = []
    if results.models:
        blocks += _models(results)
    for mended in results.mended:
        blocks += _mitigations(mended, results)
    if results.failed:
        blocks += [f"Failed trials: {len(results.failed)} (the same command tries them again)"]
        blocks += [f"  {failed.name}  {failed.error}" for failed in results.failed]
    if results.pruned:
        blocks.append(f"Pruned: {results.pruned} training trials ended early (train.pruner).")
    if results.unspent:
        blocks.append(f"Budget spent: {results.unspent} trials were not begun; a larger budget goes on.")
    if results.open > results.unspent:
        left = results.open - results.unspent
        blocks.append(f"Not finished: {left} trials are left; the same command goes on.")
    elif results.config.has_mitigation_stage and not worst_collapse(results.models, results.config):
        blocks.append(
            "No mitigation was tried: no model solved its task and was measured beyond 16x its length."
        )
    return blocks


def _models(results: Results) -> list[RenderableType]:
    models, front = results.models, results.pareto
    objectives = objectives_of(results.config.train)
    table = Table(title="Models", title_justify="left")
    names = [name.rsplit("/", 1)[-1] for name in objectives]
    further = (["Pareto"] if len(names) > 1 else []) + (["bounds"] if any(m.broken for m in models) else [])
    for heading in ("", "at training length", "collapse", "forgetting", *names, *further, "time"):
        table.add_column(heading, justify="left" if not heading else "right")
    for model in models:
        cells = [f"{value:.3f}" for value in model.values.values()] or [f"{model.value:.3f}"]
        if len(names) > 1:
            cells.append("front" if any(model is one for one in front) else "")
        if "bounds" in further:
            cells.append("; ".join(model.broken) and f"breaks {'; '.join(model.broken)}")
        table.add_row(model.label, *_verdict(model), *cells, f"{model.seconds:.0f} s")
    return [
        table,
        *_front(front, list(objectives)),
        LEGEND,
        _by_length("Recent needles: exact match by prompt length", models, lambda m: m.recent),
        _by_length("Recall over all depths: exact match by prompt length", models, lambda m: m.recall),
    ]


def _front(front: Sequence[Measured], names: list[str]) -> list[RenderableType]:
    """Of several objectives, the models among which only taste can choose."""
    if len(names) < 2:
        return []
    table = Table(title="Pareto front", title_justify="left")
    for heading in ("", *names):
        table.add_column(heading, justify="left" if not heading else "right")
    for model in front:
        table.add_row(model.label, *(f"{model.values[name]:.4g}" for name in names))
    return [
        table,
        "Pareto front: of these, no model is beaten in all objectives by another within the bounds.",
    ]


def _verdict(model: Measured) -> list[str]:
    if model.in_length is None:
        return ["", "", ""]
    if not model.is_solved:
        return [f"unsolved {model.in_length:.2f}", "", ""]
    return [
        f"solved {model.in_length:.2f}",
        _lost_from(model.conclusion["collapse_length"], model.recent),
        _lost_from(model.conclusion["forgetting_length"], model.recall),
    ]


def _mitigations(mended: Mended, results: Results) -> list[RenderableType]:
    task, collapse, _ = _verdict(mended.model)
    state = f"{task}, collapse {collapse}" if collapse else task
    head = f"Mitigations of {mended.model.label} ({state}): {len(mended.tried)} settings tried"
    if mended.baseline is None:
        return [f"{head}: the comparison on fresh prompts is not done yet."]
    metric = results.config.mitigation.metric
    table = Table(title=f"{head}\nThe best of each on fresh prompts", title_justify="left")
    for heading in ("", metric.rsplit("/", 1)[-1], "at training length", "change there"):
        table.add_column(heading, justify="left" if not heading else "right")
    for measured in mended.compared:
        cost = "" if measured is mended.baseline else _signed(mended.cost(measured))
        within = "" if measured.in_length is None else f"{measured.in_length:.2f}"
        table.add_row(measured.label, f"{measured.value:.3f}", within, cost)
    return [
        table,
        _by_length("Recent needles: exact match by prompt length", mended.compared, lambda m: m.recent),
        _by_length(
            "Recall over all depths: exact match by prompt length", mended.compared, lambda m: m.recall
        ),
        conclusion(mended, results)
        + ("" if mended.model.is_solved else " The model is unsolved: this says nothing of collapse."),
    ]


def conclusion(mended: Mended, results: Results) -> str:
    """The best setting, what it changes and costs; or that none helps."""
    baseline, config = mended.baseline, results.config.mitigation
    assert baseline is not None
    sign = 1 if config.direction == "maximize" else -1
    others = [m for m in mended.compared if mitigation(m) != "none" and not m.broken]
    affordable = [measured for measured in others if (mended.cost(measured) or 0.0) <= config.max_cost]
    best = max(affordable or others, key=lambda m: (sign * m.value, m.held), default=None)
    if best is None:
        return "Best setting: none; no comparison has finished."
    change = f"{config.metric} {baseline.value:.2f} -> {best.value:.2f}"
    if baseline.in_length is not None and best.in_length is not None:
        change += f", at the training length {baseline.in_length:.2f} -> {best.in_length:.2f}"
    both = sorted(best.recent.keys() & baseline.recent.keys())
    apart = [short_number(n) for n in both if best.recent[n].low > baseline.recent[n].high]
    if not affordable:
        dear = f"Each costs more than {config.max_cost:g} in length"
        return f"Best setting: none. {dear}. {best.label}: {change}."
    if sign * (best.value - baseline.value) <= 0:
        still = f" It does help recent needles at {', '.join(apart)}." if apart else ""
        return f"Best setting: none. No mitigation improves {config.metric}. {best.label}: {change}.{still}"
    if apart:
        sure = f"95% intervals of recent needles lie apart at {', '.join(apart)}."
    else:
        sure = "95% intervals of recent needles overlap at every length: not shown to help; try more prompts."
    return f"Best setting: {best.label}: {change}. {sure}"


def _by_length(
    title: str, measured: Sequence[Measured], shares: Callable[[Measured], dict[int, Share]]
) -> RenderableType:
    """A row each, exact match at every length; brackets mark lengths that training has covered."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    lengths = sorted({length for one in measured for length in shares(one)})
    if not lengths:
        return f"{title}: not measured"
    for length in lengths:
        table.add_column(short_number(length), justify="right")
    for one in measured:
        cells = []
        for length in lengths:
            share = shares(one).get(length)
            text = "" if share is None else f"{share.exact:.2f}"
            cells.append(f"({text})" if text and length <= one.train_length else text)
        table.add_row(one.label, *cells)
    return table


def _lost_from(length: int | None, shares: dict[int, Share]) -> str:
    if not shares:
        return "not measured"
    return f"from {short_number(length)}" if length else f"none to {short_number(max(shares))}"


def _signed(cost: float | None) -> str:
    return "" if cost is None else f"{0.0 - cost:+.2f}"

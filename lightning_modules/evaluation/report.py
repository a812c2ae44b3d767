"""An evaluation for eyes: figures, a table, a few lines on the terminal. Works from evaluation.json alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from conf.mitigation import changed_settings
from lightning_modules.figures import accuracy_by_length, loss_by_position, passkey_heatmap

Rows = list[dict[str, Any]]


def draw_figures(evaluation: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """(file name, figure) of every figure that the measured suites allow."""
    train_length, passkey, loss = (evaluation[name] for name in ("train_length", "passkey", "loss"))
    suffix = describe_mitigation(evaluation["mitigation"])
    suffix = f"\n{suffix}" if suffix else ""
    if passkey is not None:
        series = {f"recent: needle within the last {evaluation['recent_window']} tokens": passkey["recent"]}
        if passkey["recall"]:
            series["recall: needle at any depth"] = passkey["recall_by_length"]
            title = f"Passkey exact match by depth of the needle{suffix}"
            yield "passkey_heatmap.png", passkey_heatmap(passkey["recall"], train_length, title=title)
        title = f"Passkey exact match by prompt length{suffix}"
        yield "accuracy_by_length.png", accuracy_by_length(series, train_length, title=title)
    if loss is not None:
        title = f"Loss by position{suffix}"
        yield "loss_by_position.png", loss_by_position({loss["text"]: loss}, train_length, title=title)
    perplexity = evaluation["perplexity"]
    if perplexity is not None:
        title = f"Loss by position in {perplexity['documents']} documents{suffix}"
        series = {perplexity["text"]: perplexity}
        yield "document_loss.png", loss_by_position(series, train_length, title=title)
    style = {"measure": "accuracy", "name": "answers right"}
    for name, task in evaluation["tasks"].items():
        series = {name: task["by_length"]}
        title = f"{name}: answers right by prompt length{suffix}"
        yield f"{name}.png", accuracy_by_length(series, train_length, title=title, **style)
        if task["by_depth"]:
            title = f"{name}: answers right by depth{suffix}"
            yield f"{name}_heatmap.png", passkey_heatmap(task["by_depth"], train_length, title=title, **style)


def describe_mitigation(mitigation: dict[str, Any]) -> str:
    """`forget_more (alpha_scale 0.999)`; empty for none."""
    if mitigation["name"] == "none":
        return ""
    changed = [_in_words(name, value) for name, value in changed_settings(mitigation).items()]
    return f"{mitigation['name']} ({', '.join(changed)})" if changed else mitigation["name"]


def _in_words(name: str, value: Any) -> str:
    if name == "calibration":
        return "calibrated"
    if name == "calibration_scale":
        return f"x {value:g}"
    if isinstance(value, list):
        return f"{name} {' '.join(map(str, value))}"
    return f"{name} {value:g}"


def accuracy_table(passkey: dict[str, Rows]) -> dict[str, list[Any]]:
    """Accuracy by length in columns, recent needles first, then all depths."""
    names = ("length", "prompts", "digits", "digits_low", "digits_high", "exact", "exact_low", "exact_high")
    rows = [("recent", row) for row in passkey["recent"]]
    rows += [("all depths", row) for row in passkey["recall_by_length"]]
    return {"needles": [kind for kind, _ in rows]} | {name: [row[name] for _, row in rows] for name in names}


def print_summary(
    evaluation: dict[str, Any], numbers: dict[str, float], run_dir: Path, figures: list[Path]
) -> None:
    """The table, the conclusion, and where everything is."""
    console = Console(highlight=False, soft_wrap=True)
    if evaluation["passkey"] is not None:
        console.print(_rich_table(evaluation))
    if evaluation["tasks"]:
        console.print(_tasks_table(evaluation))
    if evaluation["conclusion"]["summary"]:
        console.print(evaluation["conclusion"]["summary"])
    for task in evaluation["tasks"].values():
        console.print(task["summary"])
    if evaluation["perplexity"] is not None:
        console.print(evaluation["perplexity"]["summary"])
    if "states/retention_max" in numbers:
        growth, kept = numbers.get("states/rms_growth_max", float("nan")), numbers["states/retention_max"]
        length = evaluation["states"]["length"]
        console.print(f"States to {length:,} tokens: RMS grows up to {growth:.2f} times beyond training.")
        console.print(f"Of the first token heads keep up to {kept:.3f} over one training length.")
    speed, peak = numbers["speed/tokens_per_second"], numbers["memory/peak_mib"]
    console.print(f"{speed:,.0f} tokens/s, peak memory {peak:,.0f} MiB")
    for path in (run_dir / "evaluation.json", *figures):
        console.print(str(path))


def _rich_table(evaluation: dict[str, Any]) -> Table:
    passkey, train_length = evaluation["passkey"], evaluation["train_length"]
    mitigation = describe_mitigation(evaluation["mitigation"]) or "no mitigation"
    table = Table(title=f"Passkey exact match and 95% interval, {mitigation}", title_justify="left")
    table.add_column("length", justify="right")
    table.add_column("x trained", justify="right")
    table.add_column(f"recent (last {evaluation['recent_window']})", justify="right")
    table.add_column("any depth", justify="right")
    recall = {row["length"]: row for row in passkey["recall_by_length"]}
    for row in passkey["recent"]:
        length = row["length"]
        far = _with_interval(recall[length]) if length in recall else "-"
        table.add_row(f"{length:,}", f"{length / train_length:g}", _with_interval(row), far)
    return table


def _tasks_table(evaluation: dict[str, Any]) -> Table:
    tasks = evaluation["tasks"]
    mitigation = describe_mitigation(evaluation["mitigation"]) or "no mitigation"
    table = Table(title=f"Answers right and 95% interval by length, {mitigation}", title_justify="left")
    table.add_column("", no_wrap=True)
    lengths = sorted({row["length"] for task in tasks.values() for row in task["by_length"]})
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    for name, task in tasks.items():
        found = {row["length"]: _with_interval(row, "accuracy") for row in task["by_length"]}
        table.add_row(name, *(found.get(length, "-") for length in lengths))
    return table


def _with_interval(row: dict[str, Any], measure: str = "exact") -> str:
    mark = " non-finite" if row["non_finite"] else ""
    return f"{row[measure]:.2f} [{row[f'{measure}_low']:.2f}, {row[f'{measure}_high']:.2f}]{mark}"

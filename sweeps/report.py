"""python -m sweeps.report study=DIR

Print what a sweep has found so far and write it again: report.txt, report.html (all of it,
one file), results.csv (a row per trial), figures.
"""

import csv
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.load import from_command_line, user_errors
from conf.schema import TrackingConfig
from conf.sweep_schema import ReportConfig, SweepConfig

if TYPE_CHECKING:
    from rich.console import Console

    from sweeps.laws.report import Report

WIDTH = 120


def main(argv: list[str] | None = None) -> int:
    args = from_command_line(ReportConfig, __doc__ or "", argv)
    with user_errors():
        write_report(Path(args.study), make_console())
    return 0


def make_console() -> "Console":
    """Standard output, as wide as the terminal; wide enough for the tables where it is none."""
    from rich.console import Console

    # no markup: a command's [/a/path] would be taken for a tag
    return Console(markup=False) if sys.stdout.isatty() else Console(width=WIDTH, markup=False)


def write_report(study_dir: Path, console: "Console", resamples: int | None = None) -> list[Path]:
    """Print the report and leave it in the study directory; returns the files: text, page, table, figures.

    resamples: no more than so many behind the intervals of laws, for a report in a hurry.
    """
    from rich.console import Console

    from sweeps.stores.study_dir import load

    config = load(study_dir)
    if resamples is not None and resamples < config.capacity.resamples:
        config = replace(config, capacity=replace(config.capacity, resamples=resamples))
    report = _report(config, study_dir)
    with (study_dir / "report.txt").open("w") as file:
        for target in (console, Console(file=file, width=WIDTH, markup=False)):
            for block in report.blocks:
                target.print(block, highlight=False)
            target.print("Figures:" if report.figures else "Figures: none, nothing was measured by length.")
            for figure, _ in report.figures:
                target.print(f"  {figure}", soft_wrap=True, highlight=False)
    _write_csv(study_dir / "results.csv", report.rows)
    _write_page(config, study_dir, report)
    console.print(f"The whole report:  {study_dir / 'report.html'}", soft_wrap=True, highlight=False)
    if config.tracking.enabled:
        console.print(
            f"Every run, metric and figure:  {ui_line(config.tracking.uri)}", soft_wrap=True, highlight=False
        )
    files = [study_dir / name for name in ("report.txt", "report.html", "results.csv")]
    return [*files, *(figure for figure, _ in report.figures)]


def _report(config: SweepConfig, study_dir: Path) -> "Report":
    """What the sweep has found: words, figures, rows."""
    from sweeps.laws import factorial
    from sweeps.laws.capacity import STUDY
    from sweeps.laws.report import Report, report_capacity
    from sweeps.reports.figures import write_figures
    from sweeps.reports.results import collect, table_rows
    from sweeps.reports.tables import render
    from sweeps.stores.store import stage_name
    from sweeps.stores.studies import load_studies

    studies = load_studies(study_dir)
    if config.has_capacity_stage:
        found = [study for study in studies if stage_name(study) == STUDY]
        if found:
            return report_capacity(config, study_dir, found[0])
    results = collect(study_dir, config, studies)
    blocks, figures = render(results), [(path, "") for path in write_figures(results, study_dir / "figures")]
    crossed = factorial.Factorial.of(results)
    if crossed is not None:
        blocks += factorial.render(crossed)
        figures.insert(0, (factorial.write_figure(crossed, study_dir / "figures"), factorial.CAPTION))
    return Report(blocks=blocks, figures=figures, rows=table_rows(results))


def _write_page(config: SweepConfig, study_dir: Path, report: "Report") -> None:
    """report.html: the same words, the figures inside, a row for every run."""
    from conf.load import to_yaml
    from lightning_modules.run_dir import write_text
    from sweeps.reports import page

    parts = [page.text_block((study_dir / "report.txt").read_text().split("\nFigures:")[0])]
    parts += [page.heading("Figures"), *(page.figure(path, caption) for path, caption in report.figures)]
    parts += [page.heading("Runs"), page.table(report.rows)]
    parts += [page.folded("Settings of the sweep", page.text_block(to_yaml(config)))]
    write_text(study_dir / "report.html", page.page(f"Sweep {config.name}", parts))


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def ui_line(uri: str) -> str:
    """The one line that opens the records."""
    if uri.startswith(("http://", "https://")):
        return uri
    return "make ui" + ("" if uri == TrackingConfig().uri else f" STORE={uri}")


if __name__ == "__main__":
    sys.exit(main())

"""python -m sweeps.report study=DIR

Print what a sweep has found so far and write it again: report.txt, results.csv (a row per trial), figures.
"""

import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.load import from_command_line, user_errors
from conf.schema import TrackingConfig
from conf.sweep_schema import ReportConfig

if TYPE_CHECKING:
    from rich.console import Console

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


def write_report(study_dir: Path, console: "Console") -> list[Path]:
    """Print the report and leave it in the study directory; returns the files: text, table, figures."""
    from rich.console import Console

    from sweeps.figures import write_figures
    from sweeps.results import collect, table_rows
    from sweeps.studies import load_studies
    from sweeps.study_dir import load
    from sweeps.tables import render

    config = load(study_dir)
    results = collect(study_dir, config, load_studies(study_dir))
    figures = write_figures(results, study_dir / "figures")
    with (study_dir / "report.txt").open("w") as file:
        for target in (console, Console(file=file, width=WIDTH, markup=False)):
            for block in render(results):
                target.print(block, highlight=False)
            target.print("Figures:" if figures else "Figures: none, nothing was measured by length.")
            for figure in figures:
                target.print(f"  {figure}", soft_wrap=True, highlight=False)
    _write_csv(study_dir / "results.csv", table_rows(results))
    if config.tracking.enabled:
        console.print(
            f"Every run, metric and figure:  {ui_line(config.tracking.uri)}", soft_wrap=True, highlight=False
        )
    return [study_dir / "report.txt", study_dir / "results.csv", *figures]


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

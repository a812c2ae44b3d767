"""The report of a study of capacity: text, figures, rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.study import Study
from rich.console import RenderableType

from conf.sweep_schema import SweepConfig
from lightning_modules.figures import save
from sweeps.laws.capacity import Capacity, collect_capacity
from sweeps.laws.figures import Laws, laws_figure, residuals
from sweeps.laws.run_figures import importances, parallel_coordinates, surface
from sweeps.laws.tables import all_laws, render

CAPTIONS = {
    "surface": "Each cell is a training length and a state size: how far what the runs are judged by gets "
    "worse, at its worst to 64x, than it is in length. The threshold is where cells turn to all seeds "
    "holding. Cells are empty where the search had no need to look.",
    "laws": "Bars: the interval in which each seed's threshold lies. Hollow triangles: known only to lie "
    "beyond. Bands: 95% intervals over resampled seeds. Stars and dashes: the paper's points and law; its "
    "models are larger by orders of magnitude.",
    "residuals": "Octaves between the middle of each interval and the fit. A form that bends away from the "
    "thresholds shows as a slope or a curve.",
    "importances": "Eta squared of a one-way analysis of variance over the solved runs.",
    "parallel_coordinates": "Each line is a run.",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """blocks: for the terminal; figures: (file, caption); rows: of every run."""

    blocks: list[RenderableType]
    figures: list[tuple[Path, str]]
    rows: list[dict[str, Any]]


def report_capacity(config: SweepConfig, study_dir: Path, study: Study) -> Report:
    """Judge, fit and draw what has finished so far."""
    return report_found(collect_capacity(config, study_dir, study), study_dir / "figures")


def report_found(found: Capacity, folder: Path) -> Report:
    laws = all_laws(found)
    return Report(blocks=render(found, laws), figures=list(_draw(found, laws, folder)), rows=run_rows(found))


def _draw(found: Capacity, laws: dict[str, Laws], folder: Path) -> Iterator[tuple[Path, str]]:
    for series in found.series:
        yield save(surface(found, series), folder / f"surface-{series}.png"), CAPTIONS["surface"]
        if any(law.thresholds for law in laws[series].values()):
            yield save(laws_figure(series, laws[series]), folder / f"laws-{series}.png"), CAPTIONS["laws"]
            drawn = residuals(series, laws[series])
            yield save(drawn, folder / f"residuals-{series}.png"), CAPTIONS["residuals"]
    if sum(judged.outcome != "unsolved" for judged in found.judged.values()) > 2:
        for name, drawn in (
            ("importances", importances(found)),
            ("parallel_coordinates", parallel_coordinates(found)),
        ):
            yield save(drawn, folder / f"{name}.png"), CAPTIONS[name]


def run_rows(found: Capacity) -> list[dict[str, Any]]:
    """Every finished run as one flat row."""
    rows = []
    for run, judged in sorted(found.judged.items()):
        size, measured = found.size(run.size), judged.measured
        row: dict[str, Any] = {"size": run.size, "n_total": size.total, "n_ssm": size.ssm}
        row |= {"train_length": run.length, "seed": run.seed, "attempt": run.attempt}
        row |= {"lr": measured.point.get("optim.lr"), "outcome": judged.outcome}
        values = (judged.in_length, judged.inside, judged.beyond)
        row |= dict(zip(found.criterion.columns, values, strict=True))
        row |= {"worst_at": judged.worst, "asked_to": judged.reach, "doubt": judged.doubt}
        if measured.loss is not None:
            row |= {"unigram_loss": measured.loss.get("unigram")}
        if judged.recalled is not None:
            row |= {"recalled": judged.recalled.low}
        row |= {f"recent_{length}": share.exact for length, share in measured.recent.items()}
        row |= {"seconds": measured.seconds, "run_dir": str(measured.run_dir)}
        rows.append({name: value for name, value in row.items() if value is not None})
    return rows

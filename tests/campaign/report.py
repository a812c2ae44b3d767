"""The campaign's table and figure."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lightning_modules.run_dir import write_text
from tests.campaign.episode import Outcome

BEGIN, END = "<!-- table: python -m tests.campaign --out docs -->", "<!-- end of table -->"


@dataclass
class Report:
    outcomes: list[Outcome]
    skipped: dict[str, str]
    seed: int
    seconds: float
    at_once: Outcome | None  # many workers on fresh stores

    @property
    def struck(self) -> Counter[str]:
        return sum((outcome.struck for outcome in self.outcomes), Counter())

    @property
    def stopped(self) -> Counter[str]:
        return sum((outcome.stopped for outcome in self.outcomes), Counter())

    @property
    def broken(self) -> list[str]:
        everything = [*self.outcomes, *([self.at_once] if self.at_once else [])]
        return [f"{outcome.name}: {line}" for outcome in everything for line in outcome.broken]

    def table(self) -> str:
        """Markdown: a row a kind."""
        rows = ["| fault | times | the sweep went on by itself | stopped, the same command went on |"]
        rows.append("| --- | ---: | ---: | ---: |")
        for kind, count in sorted(self.struck.items()):
            again = min(count, self.stopped[kind])
            rows.append(f"| {kind} | {count} | {count - again} | {again} |")
        total = sum(self.struck.values())
        again = sum(min(count, self.stopped[kind]) for kind, count in self.struck.items())
        rows.append(f"| **all** | **{total}** | **{total - again}** | **{again}** |")
        kept = sum(not outcome.broken for outcome in self.outcomes)
        rows += ["", f"{len(self.outcomes)} sweeps, {kept} of which kept every promise; seed {self.seed}; "]
        rows[-1] += f"{self.seconds / 60:.1f} minutes."
        if self.at_once is not None:
            verdict = "all succeeded" if not self.at_once.broken else "; ".join(self.at_once.broken)
            rows.append(f"24 workers started at once on fresh stores: {verdict}.")
        rows += [f"Skipped: {kind}: {why}." for kind, why in self.skipped.items()]
        rows += [f"BROKEN: {line}" for line in self.broken]
        return "\n".join(rows)


def write_report(report: Report, folder: Path) -> None:
    """The figure, and the table into reliability.md, in place of the one that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(report, folder / "reliability.png")
    page = folder / "reliability.md"
    text = page.read_text() if page.exists() else f"# Reliability\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    write_text(page, f"{before}{BEGIN}\n{report.table()}\n{END}{rest.partition(END)[2]}")


def draw(report: Report, path: Path) -> None:
    """A bar a kind: faults that the sweep went on from by itself, those after which it was started again."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = sorted(report.struck, reverse=True)
    again = [min(report.struck[kind], report.stopped[kind]) for kind in kinds]
    alone = [report.struck[kind] - n for kind, n in zip(kinds, again, strict=True)]
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    axes.barh(kinds, alone, color="#4477aa", label="the sweep went on by itself")
    axes.barh(kinds, again, left=alone, color="#ddaa33", label="it stopped; the same command went on")
    lost = len(report.broken)
    axes.set_xlabel("faults")
    axes.set_title(
        f"{sum(report.struck.values())} faults in {len(report.outcomes)} sweeps: {lost} promises broken",
        fontsize=11,
    )
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, -0.22), ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)

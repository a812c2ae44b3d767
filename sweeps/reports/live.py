"""What a running sweep shows: one live table in a terminal, a line per event anywhere else."""

import time
from pathlib import Path
from types import TracebackType
from typing import Self

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sweeps.planning.budget import budget_of, spent_seconds, spent_tokens
from sweeps.planning.samplers import point_of
from sweeps.reports.progress import progress, speed
from sweeps.reports.results import describe, shown_seed
from sweeps.stores.store import Store, stage_name

ROWS = 16
LINE_EVERY_SECONDS = 30.0
STATES = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "done",
    TrialState.FAIL: "failed",
    TrialState.PRUNED: "pruned",
}
STYLES = {
    TrialState.RUNNING: "cyan",
    TrialState.COMPLETE: "green",
    TrialState.PRUNED: "yellow",
    TrialState.FAIL: "red",
}


class Display:
    """Follows the studies of one stage. In a terminal it redraws; elsewhere it prints what has changed."""

    def __init__(self, console: Console, store: Store, title: str, studies: list[Study]) -> None:
        self.console, self.store, self.title, self.studies = console, store, title, studies
        self.config = store.config
        self._started = time.monotonic()
        self._ended_before = sum(trial.state.is_finished() for trial in self._trials().values())
        self._known = {key: trial.state for key, trial in self._trials().items() if trial.state.is_finished()}
        self._line_at = 0.0
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        else:
            self.console.print(
                f"{self.title}: {len(self._trials())} trials, {len(self._known)} of them ended before"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self) -> None:
        trials = self._trials()
        if self._live:
            self._live.update(self._table(trials), refresh=True)
        else:
            self._print_changes(trials)

    def _trials(self) -> dict[tuple[str, int], FrozenTrial]:
        return {
            (stage_name(study), t.number): t
            for study in self.studies
            for t in study.get_trials(deepcopy=False)
        }

    def _print_changes(self, trials: dict[tuple[str, int], FrozenTrial]) -> None:
        for key, trial in trials.items():
            before, self._known[key] = self._known.get(key), trial.state
            if before == trial.state or trial.state == TrialState.WAITING:
                continue
            name = f"{key[0]}/trial-{key[1]:04d}"
            what = f"{STATES[trial.state]}  {self._settings(key[0], trial)}"
            self.console.print(f"{name}  {what}  {_outcome(trial)}".rstrip(), soft_wrap=True)
        if time.monotonic() - self._line_at > LINE_EVERY_SECONDS:
            self._line_at = time.monotonic()
            running = [(key, t) for key, t in trials.items() if t.state == TrialState.RUNNING]
            doing = [f"{name}/{number:04d} {self._progress(name, t)[0]}" for (name, number), t in running]
            self.console.print(f"  {self._summary(trials)}  {'; '.join(doing)}".rstrip(), soft_wrap=True)

    def _table(self, trials: dict[tuple[str, int], FrozenTrial]) -> Table:
        table = Table(title=f"{self.title}: {self._summary(trials)}", title_justify="left", expand=False)
        for heading in ("trial", "settings", "state", "progress", "value", "elapsed"):
            table.add_column(heading, justify="right" if heading in ("value", "elapsed") else "left")
        shown = self._choose(trials)
        for (name, number), trial in shown.items():
            running = trial.state == TrialState.RUNNING
            table.add_row(
                f"{name}/{number:04d}",
                self._settings(name, trial),
                Text(STATES[trial.state], style=STYLES.get(trial.state, "")),
                self._progress(name, trial)[0] if running else trial.user_attrs.get("error", ""),
                _values(trial),
                duration(_elapsed(trial)) if trial.state != TrialState.WAITING else "",
            )
        if len(shown) < len(trials):
            table.caption = f"{len(trials) - len(shown)} more"
        return table

    def _choose(self, trials: dict[tuple[str, int], FrozenTrial]) -> dict[tuple[str, int], FrozenTrial]:
        """All trials where they fit, else those that run, then the last that ended, then those that wait."""
        if len(trials) <= ROWS:
            return trials
        order = {TrialState.RUNNING: 0, TrialState.WAITING: 2}  # those that have ended come between
        ranked = sorted(trials, key=lambda k: (order.get(trials[k].state, 1), -_ended(trials[k]), k))
        chosen = set(ranked[:ROWS])
        return {key: trial for key, trial in trials.items() if key in chosen}

    def _summary(self, trials: dict[tuple[str, int], FrozenTrial]) -> str:
        """`3/8 done, 1 failed, best 0.52 (train/0002), 4m10s, 12 trials/h, 9,000 tokens/s, about 3m left`."""
        states = [trial.state for trial in trials.values()]
        parts = [f"{states.count(TrialState.COMPLETE)}/{len(states)} done"]
        for state in (TrialState.PRUNED, TrialState.FAIL):
            if state in states:
                parts.append(f"{states.count(state)} {STATES[state]}")
        parts += self._best(trials)
        elapsed = time.monotonic() - self._started
        parts.append(duration(elapsed))
        ended = sum(state.is_finished() for state in states) - self._ended_before
        if ended > 0 and elapsed > 5:
            parts.append(f"{3600 * ended / elapsed:,.0f} trials/h")
        running = [(key[0], trial) for key, trial in trials.items() if trial.state == TrialState.RUNNING]
        tokens = sum(speed(self._run_dir(name, trial)) for name, trial in running)
        if tokens:
            parts.append(f"{tokens:,.0f} tokens/s")
        parts += self._spent()
        left = self._seconds_left(trials)
        if left:
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts)

    def _best(self, trials: dict[tuple[str, int], FrozenTrial]) -> list[str]:
        """The best by the first objective among those within the bounds; the report has the Pareto front."""
        able = {
            key: trial.values[0]
            for key, trial in trials.items()
            if trial.state == TrialState.COMPLETE and not any(c > 0 for c in trial.constraints.values())
        }
        if not able:
            return []
        best = (max if self.studies[0].directions[0].name == "MAXIMIZE" else min)(able, key=lambda k: able[k])
        return [f"best {able[best]:.3f} ({best[0]}/{best[1]:04d})"]

    def _spent(self) -> list[str]:
        """Of each budget that is set, what is used."""
        parts = []
        for study in self.studies:
            budget, trials = budget_of(study, self.config), study.get_trials(deepcopy=False)
            if budget.tokens is not None:
                parts.append(f"{spent_tokens(trials) / budget.tokens:.0%} of the tokens")
            if budget.hours is not None:
                parts.append(f"{spent_seconds(trials) / (3600 * budget.hours):.0%} of the hours")
        return parts

    def _seconds_left(self, trials: dict[tuple[str, int], FrozenTrial]) -> float | None:
        """From the mean of the finished trials, else from the progress of the running ones; None at first."""
        running = [(name, trial) for (name, _), trial in trials.items() if trial.state == TrialState.RUNNING]
        waiting = sum(trial.state == TrialState.WAITING for trial in trials.values())
        finished = [t.user_attrs["seconds"] for t in trials.values() if t.state == TrialState.COMPLETE]
        if not finished:
            shares = [(self._progress(name, trial)[1], _elapsed(trial)) for name, trial in running]
            finished = [elapsed / share for share, elapsed in shares if share]
        if not finished:
            return None
        mean = sum(finished) / len(finished)
        left = waiting * mean + sum(max(0.0, mean - _elapsed(trial)) for _, trial in running)
        return left / min(self.config.workers or 1, max(1, waiting + len(running)))

    def _progress(self, name: str, trial: FrozenTrial) -> tuple[str, float | None]:
        return progress(self._run_dir(name, trial))

    def _run_dir(self, name: str, trial: FrozenTrial) -> Path:
        return self.store.run_dir(self._study(name), trial.number)

    def _settings(self, name: str, trial: FrozenTrial) -> str:
        return describe(point_of(trial), shown_seed(self._study(name), trial))

    def _study(self, name: str) -> Study:
        return next(study for study in self.studies if stage_name(study) == name)


def duration(seconds: float) -> str:
    """45s, 4m10s, 2h05m."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _elapsed(trial: FrozenTrial) -> float:
    """Seconds of work: of a finished trial what its commands took, else the time that workers held it."""
    if "seconds" in trial.user_attrs:
        return trial.user_attrs["seconds"]
    claimed = trial.user_attrs.get("claimed")
    worked = trial.user_attrs.get("worked", 0.0)
    return worked if claimed is None else worked + max(0.0, time.time() - claimed)


def _ended(trial: FrozenTrial) -> float:
    return trial.datetime_complete.timestamp() if trial.datetime_complete else 0.0


def _values(trial: FrozenTrial) -> str:
    if trial.state != TrialState.COMPLETE:
        return ""
    broken = [name for name, excess in trial.constraints.items() if excess > 0]
    values = ", ".join(f"{value:.3f}" for value in trial.values)
    return values + (f" (breaks {'; '.join(broken)})" if broken else "")


def _outcome(trial: FrozenTrial) -> str:
    if trial.state == TrialState.FAIL:
        return trial.user_attrs.get("error", "")
    if trial.state == TrialState.PRUNED:
        return f"after {duration(_elapsed(trial))}"
    return f"{_values(trial)} after {duration(_elapsed(trial))}" if trial.values else ""

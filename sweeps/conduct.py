"""A whole sweep: stores first, then the stages one after the other, then the report.

    train         one study; a trial for every point and seed
    mitigation    a study for each model that collapses worst: the baseline, then the settings
    confirm       a study for each of these: the baseline and the best of each mitigation, on fresh prompts

Each stage of each model is one MLflow run; its trials are the children. Started again with the same config, a
sweep goes on where it was: finished trials are kept, interrupted ones continued, failed ones tried once more.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

from optuna.study import Study
from optuna.trial import TrialState
from rich.console import Console

from conf.objectives import Direction
from conf.sweep_schema import SweepConfig, mitigation_points
from conf.sweep_stages import objectives_of
from lightning_modules.tracking import Tracker
from sweeps.endings import GOES_ON, DatabaseGone
from sweeps.laws.capacity import STUDY as CAPACITY
from sweeps.laws.capacity import plan_capacity
from sweeps.mending.lost_runs import stage_tracker
from sweeps.planning.budget import is_spent
from sweeps.planning.plans import (
    Plan,
    plan_given,
    plan_mitigations,
    plan_points,
    plan_siblings,
    plan_training,
)
from sweeps.planning.samplers import point_of, powers_of
from sweeps.reconcile import mend_study, reconcile
from sweeps.report import make_console, write_report
from sweeps.reports.live import Display, duration
from sweeps.reports.results import Measured, best_settings, collect, finished, worst_collapse
from sweeps.stores.locks import ProcessLock
from sweeps.stores.store import Store
from sweeps.stores.studies import enqueue, latest, make_study, retry_failed
from sweeps.stores.study_dir import prepare
from sweeps.supervise import Pending, Stopped, SweepFailed, Workers
from sweeps.trials.steps import is_full

BASELINE = {"mitigation.name": "none"}
FEW_RESAMPLES = 20  # of a report on the way; 200 may take longer than what budget_minutes leaves
BUDGET_OVER = 0  # among received signals, whose numbers begin at 1

Grow = Callable[[Study], Plan]


def no_growth(study: Study) -> Plan:
    """The plan of a stage whose trials are all known when it starts."""
    return {}


def grow_training(config: SweepConfig, study: Study) -> Plan:
    """Further seeds of the points that a sampler has chosen, and further points while the budget lasts."""
    stage, plan = config.train, Plan()
    if stage.checkpoints or stage.sampler == "grid":
        return plan
    trials = latest(study)
    if stage.every_seed:
        for key, trial in trials.items():
            if "/" not in key and trial.state != TrialState.WAITING:
                plan |= plan_siblings(key, point_of(trial), stage.seeds[1:])
    if stage.budget.is_open_ended and not is_spent(study, config):
        waiting = sum(trial.state == TrialState.WAITING for trial in trials.values())
        points = sum("/" not in key for key in trials) + max(0, max(1, config.workers) - waiting)
        plan |= plan_training(config, points * (len(stage.seeds) if stage.every_seed else 1))
    return plan


def conduct(config: SweepConfig, command: str) -> int:
    """Run or continue the sweep; returns the exit status. `command` is what starts it again.

    Raises ValueError (one line) where the study directory or the tracking store cannot be used.
    """
    console, began = make_console(), time.monotonic()
    with _sole_sweep(config) as study_dir, _stop_signals() as signals, _budget(config, signals):
        try:
            sweep = Sweep(config, study_dir, console, signals)
            sweep.run()
        except (Stopped, DatabaseGone) as error:
            if isinstance(error, DatabaseGone) and not signals:
                console.print(f"error: {error}. To go on:  {command}", soft_wrap=True, highlight=False)
                return 1
            over = signals[0] == BUDGET_OVER
            if over and isinstance(error, Stopped):
                _report_so_far(study_dir, console)
            why = f"Stopped after budget_minutes={config.budget_minutes:g}" if over else "Stopped"
            console.print(
                f"{why}; what is finished is kept. To go on:  {command}", soft_wrap=True, highlight=False
            )
            return GOES_ON if over else 128 + signals[0]
        except Pending as pending:
            line = f"{pending}:  python -m sweeps.worker study={study_dir} wait=600"
            console.print(line, soft_wrap=True, highlight=False)
            return GOES_ON
        except SweepFailed as error:
            with suppress(OSError):  # a full disk may be what has failed
                write_report(study_dir, console)
            console.print(f"error: {error}. To go on:  {command}", soft_wrap=True, highlight=False)
            return 1
        except OSError as error:
            if not is_full(error):
                raise
            line = f"error: {error.filename or study_dir}: {error.strerror}; make room. To go on:  {command}"
            console.print(line, soft_wrap=True, highlight=False)
            return 1
        console.print(f"This start took {duration(time.monotonic() - began)}.", highlight=False)
        return 1 if sweep.failures() else 0


class Sweep:
    """The stages of one sweep, on one study directory."""

    def __init__(self, config: SweepConfig, study_dir: Path, console: Console, signals: list[int]) -> None:
        """Creates what is missing of the store, before any worker looks at it."""
        self.config, self.study_dir, self.console = config, study_dir, console
        self.store = Store(study_dir, config, create=True, repair=True, stop=lambda: bool(signals))
        self.store.require_sole_sweep()
        self.workers = Workers(self.store, signals, console.print)

    def run(self) -> None:
        for line in reconcile(self.store, holds_sweep_lock=True):
            self._say_repaired(line)
        if self.config.has_capacity_stage:
            self._measure_capacity()
            return
        with self._parent("train") as tracker:
            study = self._train_study(tracker)
            self._finish("train", study, partial(grow_training, self.config))
            models = self._models_to_mend(study)
            self._record(tracker, [study], is_last=not models)
        for model in models:
            with self._parent(f"mitigation-{model.number:04d}") as tracker:
                tried = self._mitigation_study(model, tracker)
                self._finish(f"mitigation of trial {model.number} ({model.label})", tried)
                compared = self._comparison(model, tried, tracker)
                self._finish(f"comparison on fresh prompts, trial {model.number}", compared)
                self._record(tracker, [tried, compared], is_last=model is models[-1])

    def _measure_capacity(self) -> None:
        """One stage, whose plan grows from its results: a search for thresholds (sweeps/laws)."""
        objectives = objectives_of(self.config.train)
        with self._parent(CAPACITY) as tracker:
            study = self._study(CAPACITY, {}, objectives, stage="train", mlflow_run_id=tracker.run_id)
            self._finish("capacity", study, lambda study: plan_capacity(self.config, self.study_dir, study))
            self._record(tracker, [study], is_last=True)

    def _models_to_mend(self, study: Study) -> list[Measured]:
        if not self.config.has_mitigation_stage:
            return []
        return worst_collapse(finished(self.study_dir, study), self.config)

    def failures(self) -> int:
        return len(collect(self.study_dir, self.config, self.store.load_studies()).failed)

    def _train_study(self, tracker: Tracker) -> Study:
        stage = self.config.train
        if stage.checkpoints:
            paths = [str(Path(path).resolve()) for path in stage.checkpoints]
            plan = plan_given([{"checkpoint": path} for path in paths], [None])
        else:
            plan = plan_training(self.config, stage.budget.trials or 0)
        return self._study("train", plan, objectives_of(stage), stage="train", mlflow_run_id=tracker.run_id)

    def _mitigation_study(self, model: Measured, tracker: Tracker) -> Study:
        stage = self.config.mitigation
        if stage.sampler == "grid":
            plan = plan_points(mitigation_points(self.config), [None])
        else:
            plan = plan_mitigations(stage.space, stage.budget.trials or 0)
        plan = plan_given([BASELINE], [None]) | plan
        return self._evaluations("mitigation", model, plan, tracker)

    def _comparison(self, model: Measured, tried: Study, tracker: Tracker) -> Study:
        best = best_settings(finished(self.study_dir, tried), self.config)
        plan = plan_given([BASELINE, *(measured.point for measured in best)], [None])
        return self._evaluations("confirm", model, plan, tracker)

    def _evaluations(self, stage: str, model: Measured, plan: Plan, tracker: Tracker) -> Study:
        return self._study(
            f"{stage}-{model.number:04d}",
            plan,
            objectives_of(self.config.mitigation),
            stage=stage,
            model=model.point.get("checkpoint", f"train/trial-{model.number:04d}"),
            mlflow_run_id=tracker.run_id,
        )

    def _study(self, name: str, plan: Plan, directions: dict[str, Direction], **attributes: Any) -> Study:
        powers = powers_of(self.config, "train" if attributes["stage"] == "train" else "mitigation")
        study = make_study(self.store, name, directions, powers=powers, **attributes)
        enqueue(study, plan)
        for line in mend_study(self.store, study):
            self._say_repaired(line)
        again = retry_failed(study) if self.config.retry_failed else 0
        if again:
            self.console.print(f"{name}: {again} failed trials are tried again")
        return study

    def _finish(self, title: str, study: Study, grow: Grow = no_growth) -> None:
        """Run the stage's trials to their ends, and those that `grow` adds.

        `grow(study)` is asked at the start and whenever a trial has ended: it reads what has finished and
        returns a plan; what of it the study lacks is queued. The stage is over when no trial is open and
        `grow` adds none. A sweep that was killed goes on alike if the plan depends on the results alone.
        """
        with Display(self.console, self.store, title, [study]) as display:
            self.workers.run([study], display.update, grow=lambda: enqueue(study, grow(study)))

    def _say_repaired(self, line: str) -> None:
        self.console.print(f"repaired: {line}", soft_wrap=True, highlight=False)

    def _parent(self, name: str) -> Tracker:
        """The MLflow run above a stage's trials: found again by every later start."""
        return stage_tracker(self.config, self.study_dir, name)

    def _record(self, tracker: Tracker, studies: list[Study], is_last: bool) -> None:
        """The stage's values, the report so far and its figures, into the parent run; the last is printed."""
        for study in studies:
            for measured in finished(self.study_dir, study):
                metrics = {f"{study.user_attrs['stage']}/value": measured.value}
                tracker.log_metrics(metrics, step=measured.number)
        for path in write_report(self.study_dir, self.console if is_last else Console(quiet=True)):
            tracker.log_artifact(path, "figures" if path.suffix == ".png" else None)


def _report_so_far(study_dir: Path, console: Console) -> None:
    """Of a sweep that its budget has stopped: in seconds, and never in the way of how it ends."""
    try:
        write_report(study_dir, Console(quiet=True), resamples=FEW_RESAMPLES)
    except (OSError, ValueError, DatabaseGone) as error:
        line = f"No report of what there is: {error}"
    else:
        line = f"What there is so far:  {study_dir / 'report.html'}"
    console.print(line, soft_wrap=True, highlight=False)


@contextmanager
def _sole_sweep(config: SweepConfig) -> Iterator[Path]:
    """The study directory, prepared and held by this process alone."""
    study_dir = Path(config.directory)
    lock = ProcessLock(study_dir / "locks" / "sweep.lock")
    try:
        held = lock.try_acquire()
    except OSError as error:
        raise ValueError(f"study_dir={study_dir}: {error.strerror}; choose a writable place") from None
    if not held:
        raise ValueError(
            f"study_dir={study_dir}: another sweeps.run is at work there; wait for it or stop it"
        )
    try:
        yield prepare(config)
    finally:
        lock.release()


@contextmanager
def _budget(config: SweepConfig, signals: list[int]) -> Iterator[None]:
    """Asks for the end after budget_minutes, as a signal would."""
    minutes = config.budget_minutes
    timer = Timer(60 * (minutes or 0), signals.append, [BUDGET_OVER])
    timer.daemon = True
    if minutes is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT, SIGTERM and SIGHUP (unless nohup has it ignored) in place of dying of them."""
    received: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = [signal.signal(number, lambda got, _: received.append(got)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

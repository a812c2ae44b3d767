"""A whole sweep: stores first, then the stages one after the other, then the report.

    train         one study; a trial for every point and seed
    mitigation    a study for each model that collapses worst: the baseline, then the settings
    confirm       a study for each of these: the baseline and the best of each mitigation, on fresh prompts

Each stage of each model is one MLflow run; its trials are the children. Started again with the same config, a
sweep goes on where it was: finished trials are kept, interrupted ones continued, failed ones tried once more.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from optuna.storages import JournalStorage
from optuna.study import Study
from rich.console import Console

from conf.load import flatten
from conf.sweep_schema import Direction, SweepConfig, mitigation_points, train_points
from lightning_modules.tracking import Tracker
from sweeps.live import Display, duration
from sweeps.locks import ProcessLock
from sweeps.report import make_console, write_report
from sweeps.results import Measured, best_settings, collect, finished, worst_collapse
from sweeps.studies import (
    Plan,
    enqueue,
    load_studies,
    make_study,
    open_journal,
    plan_given,
    plan_mitigations,
    plan_points,
    plan_samples,
    retry_failed,
)
from sweeps.study_dir import prepare
from sweeps.supervise import Pending, Stopped, SweepFailed, Workers

PENDING = os.EX_TEMPFAIL
BASELINE = {"mitigation.name": "none"}

Grow = Callable[[Study], Plan]


def no_growth(study: Study) -> Plan:
    """The plan of a stage whose trials are all known when it starts."""
    return {}


def conduct(config: SweepConfig, command: str) -> int:
    """Run or continue the sweep; returns the exit status. `command` is what starts it again.

    Raises ValueError (one line) where the study directory or the tracking store cannot be used.
    """
    console, began = make_console(), time.monotonic()
    with _sole_sweep(config) as study_dir, _stop_signals() as signals:
        sweep = Sweep(config, study_dir, console, signals)
        try:
            sweep.run()
        except Stopped:
            console.print(
                f"Stopped; what is finished is kept. To go on:  {command}", soft_wrap=True, highlight=False
            )
            return 128 + signals[0]
        except Pending as pending:
            line = f"{pending}:  python -m sweeps.worker study={study_dir} wait=600"
            console.print(line, soft_wrap=True, highlight=False)
            return PENDING
        except SweepFailed as error:
            write_report(study_dir, console)
            console.print(f"error: {error}. To go on:  {command}", soft_wrap=True, highlight=False)
            return 1
        console.print(f"This start took {duration(time.monotonic() - began)}.", highlight=False)
        return 1 if sweep.failures() else 0


class Sweep:
    """The stages of one sweep, on one study directory."""

    def __init__(self, config: SweepConfig, study_dir: Path, console: Console, signals: list[int]) -> None:
        self.config, self.study_dir, self.console = config, study_dir, console
        self.workers = Workers(study_dir, config, signals, console.print)
        self.storage: JournalStorage = open_journal(study_dir)

    def run(self) -> None:
        with self._parent("train") as tracker:
            study = self._train_study(tracker)
            self._finish("train", study)
            models = self._models_to_mend(study)
            self._record(tracker, [study], is_last=not models)
        for model in models:
            with self._parent(f"mitigation-{model.number:04d}") as tracker:
                tried = self._mitigation_study(model, tracker)
                self._finish(f"mitigation of trial {model.number} ({model.label})", tried)
                compared = self._comparison(model, tried, tracker)
                self._finish(f"comparison on fresh prompts, trial {model.number}", compared)
                self._record(tracker, [tried, compared], is_last=model is models[-1])

    def _models_to_mend(self, study: Study) -> list[Measured]:
        if not self.config.has_mitigation_stage:
            return []
        return worst_collapse(finished(self.study_dir, study), self.config)

    def failures(self) -> int:
        return len(collect(self.study_dir, self.config, load_studies(self.study_dir, self.storage)).failed)

    def _train_study(self, tracker: Tracker) -> Study:
        stage = self.config.train
        seeds = stage.seeds
        if stage.checkpoints:
            paths = [str(Path(path).resolve()) for path in stage.checkpoints]
            plan = plan_given([{"checkpoint": path} for path in paths], [None])
        elif stage.sampler == "grid":
            plan = plan_points(train_points(self.config), seeds)
        else:
            plan = plan_samples(stage.trials or 0, seeds)
        return self._study("train", plan, stage.direction, stage="train", mlflow_run_id=tracker.run_id)

    def _mitigation_study(self, model: Measured, tracker: Tracker) -> Study:
        stage = self.config.mitigation
        if stage.sampler == "grid":
            plan = plan_points(mitigation_points(self.config), [None])
        else:
            plan = plan_mitigations(stage.space, stage.trials or 0)
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
            self.config.mitigation.direction,
            stage=stage,
            model=model.point.get("checkpoint", f"train/trial-{model.number:04d}"),
            mlflow_run_id=tracker.run_id,
        )

    def _study(self, name: str, plan: Plan, direction: Direction, **attributes: str | None) -> Study:
        study = make_study(self.storage, name, direction, **attributes)
        enqueue(study, plan)
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
        with Display(self.console, self.study_dir, self.config, title, [study]) as display:
            self.workers.run([study], display.update, grow=lambda: enqueue(study, grow(study)))

    def _parent(self, name: str) -> Tracker:
        """The MLflow run above a stage's trials: found again by every later start."""
        folder = self.study_dir / name
        folder.mkdir(exist_ok=True)
        tags = {"sweep": self.config.name, "stage": name, "study_dir": str(self.study_dir)}
        params = {key: value for key, value in flatten(self.config).items() if value not in (None, {}, [])}
        return Tracker(
            self.config.tracking, folder, name=f"{self.config.name}/{name}", params=params, tags=tags
        )

    def _record(self, tracker: Tracker, studies: list[Study], is_last: bool) -> None:
        """The stage's values, the report so far and its figures, into the parent run; the last is printed."""
        for study in studies:
            for measured in finished(self.study_dir, study):
                tracker.log_metrics(
                    {f"{study.user_attrs['stage']}/value": measured.value}, step=measured.number
                )
        for path in write_report(self.study_dir, self.console if is_last else Console(quiet=True)):
            tracker.log_artifact(path, "figures" if path.suffix == ".png" else None)


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

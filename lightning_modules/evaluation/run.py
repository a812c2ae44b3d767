"""One evaluation from config to result: load, lay out, measure, judge, write, record."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from conf.load import to_dict, to_yaml
from conf.measure_schema import EvaluateConfig, MeasureConfig
from conf.mitigation import changed_settings
from conf.schema import TrainConfig
from conf.tasks import TASKS
from lightning_modules.backbone import Mamba2LM
from lightning_modules.calibration.settle import settle_calibration
from lightning_modules.evaluation.conclusion import conclude, exact_by_length, metrics
from lightning_modules.evaluation.report import accuracy_table, draw_figures, print_summary
from lightning_modules.evaluation.states import StatesSuite, plan_states, state_metrics
from lightning_modules.evaluation.streaming import Reader
from lightning_modules.evaluation.suites import LossSuite, PasskeySuite, plan_loss, plan_passkey
from lightning_modules.evaluation.tasks import TaskSuite, plan_task
from lightning_modules.evaluation.tasks import metrics as task_metrics
from lightning_modules.evaluation.texts import PerplexitySuite, plan_perplexity
from lightning_modules.evaluation.texts import metrics as perplexity_metrics
from lightning_modules.figures import save
from lightning_modules.guests.guest import Guest
from lightning_modules.guests.load import load_subject
from lightning_modules.measuring import (
    choose_device,
    identity,
    open_measuring_dir,
    params,
    run_name,
    show_progress,
    to_json,
    tokenizer_of,
    trained_config,
    write_output,
)
from lightning_modules.memory import peak_memory_mib
from lightning_modules.mitigations import LayerMitigations, build_mitigation
from lightning_modules.run_dir import read_result, write_json
from lightning_modules.state import ModelState
from lightning_modules.tracking import Tracker


@dataclass(frozen=True)
class Subject:
    """A checkpoint, loaded, and how it was trained."""

    model: Mamba2LM | Guest
    trained: TrainConfig
    device: torch.device

    @classmethod
    def load(cls, config: MeasureConfig) -> "Subject":
        """Raises ValueError (one line) where the checkpoint or the device cannot be used."""
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        device, trained = choose_device(config.device), trained_config(config)
        return cls(load_subject(config.checkpoint, device), trained, device)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Carry out one evaluation, say what came out; returns the contents of result.json.

    Raises:
        ValueError: the checkpoint, a length, the device, the tracking store or run_dir cannot be used.
    """
    measured = measure(config, Subject.load(config))
    run_dir, result = measured.run_dir, measured.result
    if measured.fresh:
        figures = sorted((run_dir / "figures").glob("*.png"))
        print_summary(measured.evaluation, result["metrics"], run_dir, figures)
    else:
        print(f"{run_dir}: holds this evaluation already")
    return result


@dataclass(frozen=True)
class Measured:
    """An evaluation on disk. fresh: made by this call; else it was there."""

    run_dir: Path
    result: dict[str, Any]
    fresh: bool

    @property
    def evaluation(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "evaluation.json").read_text())


def measure(config: EvaluateConfig, subject: Subject, doing: str = "evaluating") -> Measured:
    """One evaluation of a loaded checkpoint, into its run directory.

    A run_dir that holds this very evaluation of this very checkpoint answers with its result at once. `doing`
    stands before the progress bar.
    """
    started = time.monotonic()
    model, trained, device = subject.model, subject.trained, subject.device
    config = replace(config, mitigation=settle_calibration(config.mitigation, config, trained, model))

    def rule(length: int) -> LayerMitigations:
        return build_mitigation(config.mitigation, trained.model, length=length)

    rule(trained.data.train_length)  # refused, if at all, before anything is made
    suites = _plan(config, trained)
    passkey_suite, loss_suite, states_suite = suites.passkey, suites.loss, suites.states
    run_dir = open_measuring_dir(config, "evaluate")
    own_identity = identity(config)
    result = read_result(run_dir)
    if result is not None:
        if result.get("identity") != own_identity:
            raise ValueError(f"run_dir={run_dir}: holds another evaluation: choose another run_dir")
        return Measured(run_dir, result, fresh=False)

    write_output(run_dir / "config.yaml", to_yaml(replace(config, run_dir=None)))
    with Tracker(
        config.tracking,
        run_dir,
        name=run_name(config, run_dir),
        params=params(config, trained),
        tags=run_tags(config),
    ) as tracker:
        with show_progress(doing, suites.tokens) as on_tokens:
            reader = Reader(model, rule(trained.data.train_length), config.segment, on_tokens)
            passkey = passkey_suite.run(reader, rule) if passkey_suite is not None else None
            loss = loss_suite.run(reader, rule) if loss_suite is not None else None
            states = None
            if states_suite is not None:
                reader.mitigation = rule(states_suite.length)
                states = states_suite.run(reader)
            perplexity = suites.perplexity.run(reader, rule) if suites.perplexity is not None else None
            tasks = {suite.name: suite.run(reader, rule) for suite in suites.tasks}
        _warn_of_non_finite(config, passkey, loss, perplexity, tasks)

        train_length = trained.data.train_length
        conclusion = conclude(train_length, passkey, loss)
        evaluation = {
            "checkpoint": config.checkpoint,
            "train_length": train_length,
            "recent_window": passkey_suite.window if passkey_suite is not None else None,
            "model": to_dict(model.config) | {"parameters": sum(p.numel() for p in model.parameters())},
            "mitigation": to_dict(config.mitigation),
            "passkey": passkey,
            "loss": loss,
            "states": states,
            "perplexity": perplexity,
            "tasks": tasks,
            "conclusion": conclusion,
        }
        write_output(run_dir / "evaluation.json", to_json(evaluation))
        for name, figure in draw_figures(evaluation):
            save(figure, run_dir / "figures" / name)
        numbers = (
            metrics(train_length, passkey, conclusion)
            | state_metrics(states)
            | perplexity_metrics(perplexity, train_length)
            | task_metrics(tasks)
            | {
                "speed/tokens_per_second": reader.tokens_per_second,
                "memory/peak_mib": peak_memory_mib(device),
                "memory/state_mib_per_sequence": _state_mib(
                    model, rule(max(_lengths(passkey, (loss, states, perplexity), tasks)))
                ),
            }
        )
        _record(tracker, numbers, evaluation)
        result = {
            "status": "completed",
            "command": "evaluate",
            "metrics": numbers,
            "mlflow_run_id": tracker.run_id,
            "seconds": time.monotonic() - started,
            "checkpoint": config.checkpoint,
            "identity": own_identity,
        }
        write_json(run_dir / "result.json", result)
    return Measured(run_dir, result, fresh=True)


def _lengths(
    passkey: dict[str, Any] | None, texts: Sequence[dict[str, Any] | None], tasks: dict[str, dict[str, Any]]
) -> list[int]:
    """Of everything that was read."""
    read = [suite["length"] for suite in texts if suite is not None]
    read += [row["length"] for task in tasks.values() for row in task["by_length"]]
    return read + ([] if passkey is None else [row["length"] for row in passkey["recent"]])


def _state_mib(model: Mamba2LM | Guest, mitigation: LayerMitigations) -> float:
    """What one sequence's recurrent state takes, however long the sequence."""
    if isinstance(model, Guest):
        return model.state_bytes() / 2**20
    return ModelState.zeros(model.config, 1, "meta", model.lm_head.weight.dtype, mitigation).nbytes / 2**20


@dataclass(frozen=True)
class Suites:
    """What an evaluation reads; None for what was not asked for."""

    passkey: PasskeySuite | None
    loss: LossSuite | None
    states: StatesSuite | None
    perplexity: PerplexitySuite | None
    tasks: list[TaskSuite]

    @property
    def tokens(self) -> int:
        suites = (self.passkey, self.loss, self.states, self.perplexity, *self.tasks)
        return sum(suite.tokens for suite in suites if suite is not None)


def _plan(config: EvaluateConfig, trained: TrainConfig) -> Suites:
    """Everything that will be read, laid out before the run is opened: a mistake leaves nothing behind."""
    tokenizer, vocab_size = tokenizer_of(config, trained), trained.model.vocab_size
    names = [name for name in config.suites if name in TASKS]
    return Suites(
        plan_passkey(config, trained.data, tokenizer) if "passkey" in config.suites else None,
        plan_loss(config, trained.data, tokenizer) if "loss" in config.suites else None,
        plan_states(config, trained.data, tokenizer) if "states" in config.suites else None,
        plan_perplexity(config, trained.data, tokenizer) if "perplexity" in config.suites else None,
        [plan_task(name, config, trained.data, tokenizer, vocab_size) for name in names],
    )


def run_tags(config: EvaluateConfig) -> dict[str, str]:
    return {"command": "evaluate", "checkpoint": config.checkpoint, "mitigation": config.mitigation.name}


def _warn_of_non_finite(
    config: EvaluateConfig,
    passkey: dict[str, Any] | None,
    loss: dict[str, Any] | None,
    perplexity: dict[str, Any] | None,
    tasks: dict[str, dict[str, Any]],
) -> None:
    """One line for every length at which the model put out NaN or infinity."""
    lengths = set()
    if passkey is not None:
        rows = [*passkey["recent"], *passkey["recall_by_length"]]
        lengths |= {f"passkey prompts of {row['length']} tokens" for row in rows if row["non_finite"]}
    for name, task in tasks.items():
        bad = [row["length"] for row in task["by_length"] if row["non_finite"]]
        lengths |= {f"{name} prompts of {length} tokens" for length in bad}
    for name, curve in (("the loss", loss), ("the loss of documents", perplexity)):
        if curve is not None and curve["non_finite"]:
            pairs = zip(curve["position"], curve["loss"], strict=True)
            lengths.add(f"{name} near token {next(p for p, value in pairs if value is None):.0f}")
    settings = {"name": config.mitigation.name, **changed_settings(to_dict(config.mitigation))}
    for what in sorted(lengths):
        print(f"warning: NaN or infinity in {what}, mitigation {settings}: counted as wrong", file=sys.stderr)


def _record(tracker: Tracker, numbers: dict[str, float], evaluation: dict[str, Any]) -> None:
    """Everything into MLflow. Accuracy is there twice: by name, and as a curve whose step is the length."""
    tracker.log_metrics(numbers, step=0)
    passkey = evaluation["passkey"]
    if passkey is not None:
        for name, key in (("recent", "recent"), ("recall", "recall_by_length")):
            for length, exact in exact_by_length(passkey[key]).items():
                tracker.log_metrics({f"passkey/{name}_exact": exact}, step=length)
    for name, task in evaluation["tasks"].items():
        for row in task["by_length"]:
            tracker.log_metrics({f"{name}/accuracy": row["accuracy"]}, step=row["length"])
    send_evaluation(tracker, evaluation)


def send_evaluation(tracker: Tracker, evaluation: dict[str, Any]) -> None:
    """What an evaluation leaves in its directory, but for the metrics."""
    passkey, conclusion = evaluation["passkey"], evaluation["conclusion"]
    if passkey is not None:
        tracker.log_table(accuracy_table(passkey), "accuracy_by_length.json")
    for path in sorted((tracker.run_dir / "figures").glob("*.png")):
        tracker.log_artifact(path, "figures")
    for name in ("config.yaml", "evaluation.json"):
        tracker.log_artifact(tracker.run_dir / name)
    tracker.set_tags({name: conclusion[name] for name in ("solved", "collapse", "forgetting", "loss_rises")})

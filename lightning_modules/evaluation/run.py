"""One evaluation from config to result: load, lay out, measure, judge, write, record."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from conf.load import to_dict, to_yaml
from conf.mitigation import changed_settings
from conf.schema import EvaluateConfig, TrainConfig
from lightning_modules.calibration.settle import settle_calibration
from lightning_modules.checkpoints import load_config, load_model
from lightning_modules.evaluation.conclusion import conclude, exact_by_length, metrics
from lightning_modules.evaluation.report import accuracy_table, draw_figures, print_summary
from lightning_modules.evaluation.streaming import Reader
from lightning_modules.evaluation.suites import LossSuite, PasskeySuite, plan_loss, plan_passkey
from lightning_modules.figures import save
from lightning_modules.measuring import (
    choose_device,
    identity,
    open_measuring_dir,
    params,
    peak_memory_mib,
    run_name,
    show_progress,
    to_json,
    tokenizer_of,
    write_output,
)
from lightning_modules.mitigations import LayerMitigations, build_mitigation
from lightning_modules.run_dir import read_result, write_json
from lightning_modules.tracking import Tracker


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Carry out one evaluation; returns the contents of result.json.

    A run_dir that holds this very evaluation of this very checkpoint answers with its result at once.

    Raises:
        ValueError: the checkpoint, a length, the device, the tracking store or run_dir cannot be used.
    """
    started = time.monotonic()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    trained = load_config(config.checkpoint)
    model = load_model(config.checkpoint, device=device)
    config = replace(config, mitigation=settle_calibration(config.mitigation, config, trained, model))

    def rule(length: int) -> LayerMitigations:
        return build_mitigation(config.mitigation, trained.model, length=length)

    rule(trained.data.train_length)  # refused, if at all, before anything is made
    passkey_suite, loss_suite = _plan(config, trained)
    run_dir = open_measuring_dir(config, "evaluate")
    measured = identity(config)
    result = read_result(run_dir)
    if result is not None:
        if result.get("identity") != measured:
            raise ValueError(f"run_dir={run_dir}: holds another evaluation: choose another run_dir")
        print(f"{run_dir}: holds this evaluation already")
        return result

    write_output(run_dir / "config.yaml", to_yaml(replace(config, run_dir=None)))
    with Tracker(
        config.tracking,
        run_dir,
        name=run_name(config, run_dir),
        params=params(config, trained),
        tags=_tags(config),
    ) as tracker:
        total = sum(suite.tokens for suite in (passkey_suite, loss_suite) if suite is not None)
        with show_progress("evaluating", total) as on_tokens:
            reader = Reader(model, rule(trained.data.train_length), config.segment, on_tokens)
            passkey = passkey_suite.run(reader, rule) if passkey_suite is not None else None
            loss = loss_suite.run(reader, rule) if loss_suite is not None else None
        _warn_of_non_finite(config, passkey, loss)

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
            "conclusion": conclusion,
        }
        write_output(run_dir / "evaluation.json", to_json(evaluation))
        figures = [save(figure, run_dir / "figures" / name) for name, figure in draw_figures(evaluation)]
        numbers = metrics(train_length, passkey, conclusion) | {
            "speed/tokens_per_second": reader.tokens_per_second,
            "memory/peak_mib": peak_memory_mib(device),
        }
        _record(tracker, numbers, evaluation, figures)
        result = {
            "status": "completed",
            "command": "evaluate",
            "metrics": numbers,
            "mlflow_run_id": tracker.run_id,
            "seconds": time.monotonic() - started,
            "checkpoint": config.checkpoint,
            "identity": measured,
        }
        write_json(run_dir / "result.json", result)
    print_summary(evaluation, numbers, run_dir, figures)
    return result


def _plan(config: EvaluateConfig, trained: TrainConfig) -> tuple[PasskeySuite | None, LossSuite | None]:
    """Everything that will be read, laid out before the run is opened: a mistake leaves nothing behind."""
    tokenizer = tokenizer_of(config, trained)
    return (
        plan_passkey(config, trained.data, tokenizer) if "passkey" in config.suites else None,
        plan_loss(config, trained.data, tokenizer) if "loss" in config.suites else None,
    )


def _tags(config: EvaluateConfig) -> dict[str, str]:
    return {"command": "evaluate", "checkpoint": config.checkpoint, "mitigation": config.mitigation.name}


def _warn_of_non_finite(
    config: EvaluateConfig, passkey: dict[str, Any] | None, loss: dict[str, Any] | None
) -> None:
    """One line for every length at which the model put out NaN or infinity."""
    lengths = set()
    if passkey is not None:
        rows = [*passkey["recent"], *passkey["recall_by_length"]]
        lengths |= {f"passkey prompts of {row['length']} tokens" for row in rows if row["non_finite"]}
    if loss is not None and loss["non_finite"]:
        first = next(p for p, value in zip(loss["position"], loss["loss"], strict=True) if value is None)
        lengths.add(f"the loss near token {first:.0f}")
    settings = {"name": config.mitigation.name, **changed_settings(to_dict(config.mitigation))}
    for what in sorted(lengths):
        print(f"warning: NaN or infinity in {what}, mitigation {settings}: counted as wrong", file=sys.stderr)


def _record(
    tracker: Tracker, numbers: dict[str, float], evaluation: dict[str, Any], figures: list[Path]
) -> None:
    """Everything into MLflow. Accuracy is there twice: by name, and as a curve whose step is the length."""
    tracker.log_metrics(numbers, step=0)
    passkey, conclusion = evaluation["passkey"], evaluation["conclusion"]
    if passkey is not None:
        for name, key in (("recent", "recent"), ("recall", "recall_by_length")):
            for length, exact in exact_by_length(passkey[key]).items():
                tracker.log_metrics({f"passkey/{name}_exact": exact}, step=length)
        tracker.log_table(accuracy_table(passkey), "accuracy_by_length.json")
    for path in figures:
        tracker.log_artifact(path, "figures")
    for name in ("config.yaml", "evaluation.json"):
        tracker.log_artifact(tracker.run_dir / name)
    tracker.set_tags({name: conclusion[name] for name in ("solved", "collapse", "forgetting", "loss_rises")})

"""One run of lm-evaluation-harness, from config to result.json."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table
from rich.console import Console
from rich.table import Table

from conf.harness_schema import HarnessConfig
from conf.load import to_yaml
from lightning_modules.backbone import Mamba2LM
from lightning_modules.calibration.settle import settle_calibration
from lightning_modules.evaluation.run import Subject
from lightning_modules.lm_harness.model import Length, LongstateLM
from lightning_modules.lm_harness.reading import BatchReader
from lightning_modules.measuring import (
    identity,
    open_measuring_dir,
    params,
    run_name,
    tokenizer_of,
    write_output,
)
from lightning_modules.memory import peak_memory_mib
from lightning_modules.mitigations import LayerMitigations, build_mitigation
from lightning_modules.run_dir import read_result, write_json
from lightning_modules.tracking import Tracker


def run_harness(config: HarnessConfig) -> dict[str, Any]:
    """Ask every task; returns the contents of result.json. The harness' own results are in harness.json, the
    scores of every question in scores.jsonl, each with its length.

    Raises:
        ValueError: checkpoint, device, a task or a request's length cannot be used.
    """
    started = time.monotonic()
    subject = Subject.load(config)
    own = subject.model
    if not isinstance(own, Mamba2LM):
        raise ValueError(
            f"checkpoint={config.checkpoint}: is of transformers' own: ask it by `lm_eval --model hf`"
        )
    rule = settle_calibration(config.mitigation, config, subject.trained, own)
    config = replace(config, mitigation=rule)

    def mitigation(length: int) -> LayerMitigations:
        return build_mitigation(config.mitigation, subject.trained.model, length=length)

    mitigation(subject.trained.data.train_length)  # refused, if at all, before anything is made
    manager = TaskManager(include_path=config.include_path)
    unknown = [name for name in config.tasks if name not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"tasks={config.tasks}: the harness has no {', '.join(unknown)}; `lm_eval ls tasks` lists them, "
            "include_path=DIR adds yours"
        )
    run_dir = open_measuring_dir(config, "harness")
    result = read_result(run_dir)
    if result is not None:
        if result.get("identity") != identity(config):
            raise ValueError(f"run_dir={run_dir}: holds another measurement: choose another run_dir")
        print(f"{run_dir}: holds this run of the harness already")
        return result
    write_output(run_dir / "config.yaml", to_yaml(replace(config, run_dir=None)))
    reader = BatchReader(own, mitigation, config.segment, config.rows)
    model = LongstateLM(
        reader, tokenizer_of(config, subject.trained), config.max_length, config.max_new_tokens
    )
    tags = {"command": "harness", "checkpoint": config.checkpoint, "mitigation": config.mitigation.name}
    with Tracker(
        config.tracking,
        run_dir,
        name=run_name(config, run_dir),
        params=params(config, subject.trained),
        tags=tags,
    ) as tracker:
        answered = simple_evaluate(
            model=model,
            tasks=list(config.tasks),
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            task_manager=manager,
            random_seed=config.seed,
            numpy_random_seed=config.seed,
            fewshot_random_seed=config.seed,
            log_samples=True,
        )
        assert answered is not None
        scores = scored(answered.pop("samples"), model.lengths)
        lengths = summarise(model.lengths)
        answered["tokens"] = lengths
        text = json.dumps(answered, indent=2, default=handle_non_serializable)
        write_output(run_dir / "harness.json", text + "\n")
        lines = "".join(json.dumps(row, default=handle_non_serializable) + "\n" for row in scores)
        write_output(run_dir / "scores.jsonl", lines)
        numbers = metrics(answered["results"], lengths) | {"memory/peak_mib": peak_memory_mib(subject.device)}
        tracker.log_metrics(numbers, step=0)
        for name in ("config.yaml", "harness.json", "scores.jsonl"):
            tracker.log_artifact(run_dir / name)
        result = {
            "status": "completed",
            "command": "harness",
            "metrics": numbers,
            "mlflow_run_id": tracker.run_id,
            "seconds": time.monotonic() - started,
            "checkpoint": config.checkpoint,
            "identity": identity(config),
        }
        write_json(run_dir / "result.json", result)
    print(make_table(answered))
    _print_lengths(lengths, subject.trained.data.train_length)
    print(run_dir / "harness.json")
    return result


def scored(samples: dict[str, list[dict[str, Any]]], lengths: Sequence[Length]) -> list[dict[str, Any]]:
    """Every question's scores, and the tokens of its longest request."""
    longest: dict[tuple[str, int], int] = {}
    for length in lengths:
        key = (length.task, length.doc_id)
        longest[key] = max(length.tokens, longest.get(key, 0))
    return [
        {"task": task, "doc_id": sample["doc_id"], "tokens": longest.get((task, sample["doc_id"]))}
        | {name: sample[name] for name in sample["metrics"]}
        for task, rows in samples.items()
        for sample in rows
    ]


def summarise(lengths: list[Length]) -> dict[str, dict[str, float]]:
    """Per task: how many requests, and the shortest, median and longest of them in tokens."""
    found = {}
    for task in dict.fromkeys(length.task for length in lengths):
        tokens = [length.tokens for length in lengths if length.task == task]
        found[task] = {
            "requests": len(tokens),
            "shortest": min(tokens),
            "median": float(np.median(tokens)),
            "longest": max(tokens),
        }
    return found


def metrics(results: dict[str, dict[str, Any]], lengths: dict[str, dict[str, float]]) -> dict[str, float]:
    """`harness/task/metric` -> number; the harness calls a metric `acc,none` after its filter."""
    longest = {f"harness/{task}/longest_tokens": float(row["longest"]) for task, row in lengths.items()}
    return longest | {
        f"harness/{task}/{name.removesuffix(',none').replace(',', '/')}": float(value)
        for task, row in results.items()
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
    }


def _print_lengths(lengths: dict[str, dict[str, float]], train_length: int) -> None:
    console = Console(highlight=False)
    said = f"Tokens behind each score; nothing was truncated (trained at {train_length:,}):"
    console.print(said, soft_wrap=True)
    table = Table()
    for name in ("task", "requests", "shortest", "median", "longest"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, row in lengths.items():
        table.add_row(task, *(f"{row[name]:,.0f}" for name in list(row)))
    console.print(table)

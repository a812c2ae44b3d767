"""Every mitigation on one checkpoint, with the same prompts and lengths: one table, one figure, bench.json.

run_dir/
  bench.json, figures/bench.png, result.json
  none/, forget_more-1f3a.../, ...    an evaluation each, complete in itself
A comparison that was killed goes on with the same command: what is measured is not measured again.
"""

import hashlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from conf.bench import bench_mitigations
from conf.load import to_dict, to_yaml
from conf.measure_schema import EvaluateConfig
from conf.mitigation import MitigationConfig, changed_settings
from lightning_modules.backbone import Mamba2LM
from lightning_modules.calibration.settle import holds, settle_calibration
from lightning_modules.evaluation.bench_report import columns, compare, draw, tables
from lightning_modules.evaluation.run import Measured, Subject, measure
from lightning_modules.evaluation.streaming import Reader
from lightning_modules.evaluation.suites import plan_loss
from lightning_modules.figures import save
from lightning_modules.measuring import (
    identity,
    open_measuring_dir,
    params,
    run_name,
    source_name,
    to_json,
    tokenizer_of,
    write_output,
)
from lightning_modules.memory import reset_peak_memory
from lightning_modules.mitigations import build_mitigation
from lightning_modules.run_dir import write_json
from lightning_modules.tracking import Tracker

WIDTH = 120  # of tables, where the output is no terminal
LAYER_SCALES = ("delta_scale", "decay_scale")  # compared as calibrated too, where a calibration is there


def bench(config: EvaluateConfig) -> dict[str, Any]:
    """Measure the baseline and every mitigation; returns the contents of result.json.

    Raises:
        ValueError: the checkpoint, a setting, the device, the tracking store or run_dir cannot be used.
    """
    started = time.monotonic()
    subject = Subject.load(config)
    rules = mitigations(config, subject)
    config = replace(config, run_dir=config.run_dir or _own_directory(config))
    single = replace(config, mitigation=MitigationConfig(), bench={})
    _warm_up(single, subject)
    run_dir = open_measuring_dir(config, "bench")
    tracker = Tracker(
        config.tracking,
        run_dir,
        name=run_name(config, run_dir),
        params=params(config, subject.trained),
        tags={"command": "evaluate", "checkpoint": config.checkpoint, "mitigation": "all"},
    )
    width = None if sys.stdout.isatty() else WIDTH
    console, measured = Console(highlight=False, markup=False, width=width), []
    with tracker:
        write_output(run_dir / "config.yaml", to_yaml(replace(config, run_dir=None)))
        parent = tracker.run_id or config.tracking.parent_run_id
        tracking = replace(config.tracking, parent_run_id=parent)
        for i, rule in enumerate(rules):
            one = replace(single, mitigation=rule, run_dir=str(run_dir / _slug(rule)), tracking=tracking)
            memory_is_its_own = reset_peak_memory(subject.device)
            done = measure(one, subject, f"{i + 1}/{len(rules)} {rule.name}")
            measured.append(done)
            if done.fresh and not memory_is_its_own:
                _forget_memory(done)
            how = "measured" if done.fresh else "was measured before"
            console.print(f"{done.run_dir}: {how}", soft_wrap=True)
        rows = compare([(one.evaluation, one.result["metrics"]) for one in measured])
        report = {
            "checkpoint": config.checkpoint,
            "train_length": subject.trained.data.train_length,
            "split": config.split,
            "rows": [row | {"run_dir": one.run_dir.name} for row, one in zip(rows, measured, strict=True)],
        }
        write_output(run_dir / "bench.json", to_json(report))
        figure = save(draw(report), run_dir / "figures" / "bench.png")
        _record(tracker, report, figure)
        result = {
            "status": "completed",
            "command": "evaluate",
            "metrics": measured[0].result["metrics"],
            "mlflow_run_id": tracker.run_id,
            "seconds": time.monotonic() - started,
            "checkpoint": config.checkpoint,
            "identity": identity(config),
        }
        write_json(run_dir / "result.json", result)
    for table in tables(report):
        console.print(table)
    for path in (run_dir / "bench.json", figure):
        console.print(str(path), soft_wrap=True)
    return result


def mitigations(config: EvaluateConfig, subject: Subject) -> list[MitigationConfig]:
    """The baseline, then every mitigation, calibrated where it has to be; each is seen to fit the model."""
    train_length, model = subject.trained.data.train_length, subject.model
    assert isinstance(model, Mamba2LM), "a guest runs without mitigations"
    rules = bench_mitigations(config.bench, train_length)
    for name in LAYER_SCALES:
        if name not in config.bench and holds(config.checkpoint, name, model):
            rules.append(MitigationConfig(name=name, calibration="auto"))  # type: ignore[arg-type]
    rules = [settle_calibration(rule, config, subject.trained, model) for rule in rules]
    for rule in rules:
        build_mitigation(rule, subject.trained.model, length=train_length)
    return [MitigationConfig(), *rules]


def _own_directory(config: EvaluateConfig) -> str:
    """Without a setting: named after the checkpoint and what is measured, for the same command to find."""
    return f"runs/bench-{source_name(config)}-{identity(config)[:8]}"


def _slug(rule: MitigationConfig) -> str:
    """A folder for every setting: none, forget_more-1f3a9b20. Of a calibration counts what it says."""
    settings = changed_settings(to_dict(rule))
    if rule.calibration is not None:
        settings["calibration"] = Path(rule.calibration).read_text()
    text = json.dumps(settings, sort_keys=True)
    return rule.name + (f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}" if settings else "")


def _warm_up(config: EvaluateConfig, subject: Subject) -> None:
    """Read a little, so that the baseline, measured first, does not pay for what happens once."""
    data = subject.trained.data
    suite = plan_loss(config, data, tokenizer_of(config, subject.trained))
    reader = Reader(subject.model, build_mitigation(config.mitigation, subject.trained.model), config.segment)
    for _ in reader.losses(suite.source, min(suite.length, data.train_length)):
        pass


def _forget_memory(done: Measured) -> None:
    """Peak memory is the process's: where it cannot be reset, it tells nothing of one mitigation."""
    del done.result["metrics"]["memory/peak_mib"]
    write_json(done.run_dir / "result.json", done.result)


def _record(tracker: Tracker, report: dict[str, Any], figure: Path) -> None:
    """The table, the figure, and every number by the name of its mitigation."""
    for row in report["rows"]:
        numbers = {f"{row['run_dir']}/{name}": value for name, value in row["metrics"].items()}
        tracker.log_metrics(numbers, step=0)
    tracker.log_table(columns(report), "bench_table.json")
    tracker.log_artifact(figure, "figures")
    for name in ("config.yaml", "bench.json"):
        tracker.log_artifact(tracker.run_dir / name)

"""One diagnosis from config to result: load, stream, measure, judge, write, record."""

import json
import re
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console

from conf.load import flatten, to_dict, to_yaml
from conf.measure_schema import DiagnoseConfig
from conf.schema import TrainConfig
from data.tokenizers import Tokenizer
from lightning_modules.backbone import Mamba2LM
from lightning_modules.calibration.settle import settle_calibration
from lightning_modules.diagnosis.conclusion import collapse_metrics, judge_loss, judge_needles
from lightning_modules.diagnosis.figures import draw_figures
from lightning_modules.diagnosis.findings import findings
from lightning_modules.diagnosis.heads import (
    collapsed_heads,
    head_rows,
    outlier_channels,
    over_retaining_heads,
)
from lightning_modules.diagnosis.needles import Needles, doubled_lengths, plan_needles, refined
from lightning_modules.diagnosis.page import page
from lightning_modules.diagnosis.prompts import DESCRIPTIONS, choose_prompt, prompt_source
from lightning_modules.diagnosis.reading import Measures, read_prompt, strides
from lightning_modules.diagnosis.remembrance import effective_remembrance
from lightning_modules.diagnosis.remembrance import tokens_to_read as remembrance_tokens
from lightning_modules.evaluation.report import describe_mitigation
from lightning_modules.evaluation.streaming import Reader, Source
from lightning_modules.evaluation.suites import RECALL_FACTOR
from lightning_modules.figures import save
from lightning_modules.finite import first_non_finite_parameter
from lightning_modules.guests.guest import Guest
from lightning_modules.guests.load import load_subject
from lightning_modules.guests.probe import probe_of
from lightning_modules.measuring import (
    FREE_SETTINGS,
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
from lightning_modules.tracking import Tracker

Rule = Callable[[int], LayerMitigations]


def diagnose(config: DiagnoseConfig) -> dict[str, Any]:
    """Carry out one diagnosis; returns the contents of result.json.

    A run_dir that holds this very diagnosis of this very checkpoint answers with its result at once.

    Raises:
        ValueError: the checkpoint, a length, the device, the tracking store or run_dir cannot be used, or the
            model's states are not finite within its training length.
    """
    started = time.monotonic()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    trained = trained_config(config)
    model = load_subject(config.checkpoint, device)
    config = replace(config, mitigation=settle_calibration(config.mitigation, config, trained, model))

    def rule(length: int) -> LayerMitigations:
        return build_mitigation(config.mitigation, trained.model, length=length)

    plan = _Plan(config, trained, model, tokenizer_of(config, trained), rule)
    run_dir = open_measuring_dir(config, "diagnose")
    measured = identity(config)
    result = read_result(run_dir)
    if result is not None:
        if result.get("identity") != measured:
            raise ValueError(f"run_dir={run_dir}: holds something else: choose another run_dir")
        print(f"{run_dir}: holds this diagnosis already")
        return result

    write_output(run_dir / "config.yaml", to_yaml(replace(config, run_dir=None)))
    tags = {"command": "diagnose", "checkpoint": config.checkpoint, "mitigation": config.mitigation.name}
    with Tracker(
        config.tracking,
        run_dir,
        name=run_name(config, run_dir),
        params=params(config, trained),
        tags=tags,
    ) as tracker:
        with show_progress("diagnosing", plan.tokens) as on_tokens:
            reader = Reader(model, rule(plan.length), config.segment, on_tokens)
            diagnosis, measures = plan.carry_out(reader)
        figures = _write(run_dir, diagnosis, measures)
        numbers = collapse_metrics(diagnosis["collapse"], measures) | {
            "collapse/collapsed_heads": float(len(diagnosis["collapsed_heads"])),
            "collapse/over_retaining_heads": float(len(diagnosis["over_retaining_heads"])),
            "speed/tokens_per_second": reader.tokens_per_second,
            "memory/peak_mib": peak_memory_mib(device),
        }
        _record(tracker, numbers, diagnosis, figures)
        result = {
            "status": "completed",
            "command": "diagnose",
            "metrics": numbers,
            "mlflow_run_id": tracker.run_id,
            "seconds": time.monotonic() - started,
            "checkpoint": config.checkpoint,
            "identity": measured,
        }
        write_json(run_dir / "result.json", result)
    console = Console(highlight=False, soft_wrap=True)
    for line in (*diagnosis["findings"], str(run_dir / "diagnosis.html")):
        console.print(line, markup=False)
    return result


class _Plan:
    """Everything that will be read, checked before the run is opened: a mistake leaves nothing behind."""

    def __init__(
        self,
        config: DiagnoseConfig,
        trained: TrainConfig,
        model: Mamba2LM | Guest,
        tokenizer: Tokenizer,
        rule: Rule,
    ) -> None:
        self.config, self.trained, self.model, self.rule = config, trained, model, rule
        self.train_length = trained.data.train_length
        self.length = config.length_for(self.train_length)
        self.bucket = config.bucket or max(1, self.train_length // 4)
        self._check()
        rule(self.train_length)
        self.prompt = choose_prompt(config, trained.data)
        self.source: Source = prompt_source(self.prompt, config, trained.data, tokenizer)
        self.rows = len(self.source(0, 1))
        self.needles: Needles | None = None
        if trained.data.name == "passkey":
            self.needles = plan_needles(trained.data, tokenizer, config.needle_prompts, config.seed)
        self.lengths = doubled_lengths(self.train_length, self.length)
        self.recall_lengths = [n for n in self.lengths if n <= RECALL_FACTOR * self.train_length]
        self.remembrance = config.remembrance_for(self.train_length)

    @property
    def tokens(self) -> int:
        needles = (
            0 if self.needles is None else self.needles.tokens_to_read(self.lengths, self.recall_lengths)
        )
        return self.rows * self.length + remembrance_tokens(self.remembrance, self.rows) + needles

    def carry_out(self, reader: Reader) -> tuple[dict[str, Any], Measures]:
        """Read everything; returns what diagnosis.json holds, and the curves."""
        config, thresholds = self.config, self.config.thresholds
        measures = read_prompt(
            reader,
            probe_of(self.model, thresholds.top_channels),
            self.source,
            train_length=self.train_length,
            length=self.length,
            stride=config.stride,
            bucket=self.bucket,
        )
        bad = measures.non_finite
        if bad is not None and bad.position <= self.train_length:
            raise ValueError(
                f"checkpoint={config.checkpoint}: the state of layer {bad.layer}, head {bad.head} is NaN or "
                f"infinite at token {bad.position}, within the training length: use another checkpoint"
            )
        remembrance = None
        if self.remembrance and bad is None:
            remembrance = effective_remembrance(reader, self.source, self.remembrance)
        needles = None if self.needles is None else self._ask(reader, self.needles)
        if needles is None:
            vocab = self.trained.model.vocab_size
            collapse = judge_loss(measures.loss, self.train_length, vocab, self.prompt, thresholds)
        else:
            collapse = judge_needles(needles["recent"], needles["anywhere"], thresholds)
        heads = head_rows(measures, thresholds)
        parameters = sum(p.numel() for p in self.model.parameters())
        shape = {"parameters": parameters, "n_heads": self.model.config.n_heads}
        diagnosis: dict[str, Any] = {
            "checkpoint": config.checkpoint,
            "task": self.trained.data.name,
            "train_length": self.train_length,
            "length": self.length,
            "prompt": {"name": self.prompt, "text": DESCRIPTIONS[self.prompt], "rows": self.rows},
            "strides": strides(self.train_length, self.length, config.stride),
            "model": to_dict(self.model.config) | shape,
            "mitigation": to_dict(config.mitigation),
            "mitigation_in_words": describe_mitigation(to_dict(config.mitigation)),
            "thresholds": to_dict(thresholds),
            "collapse_position": collapse["position"],
            "collapsed_heads": collapsed_heads(heads),
            "over_retaining_heads": over_retaining_heads(heads, thresholds),
            "outlier_channels": outlier_channels(heads, measures, thresholds),
            "non_finite": None if bad is None else asdict(bad),
            "collapse": collapse,
            "needles": needles,
            "loss": measures.loss,
            "remembrance": remembrance,
            "heads": heads,
            "command": _command(config),
        }
        return diagnosis | {"findings": findings(diagnosis)}, measures

    def _ask(self, reader: Reader, needles: Needles) -> dict[str, list[dict[str, Any]]]:
        config = self.config

        def ask(length: int) -> dict[str, Any]:
            reader.mitigation = self.rule(length)
            return needles.ask(reader, length)

        anywhere = []
        for length in self.recall_lengths:
            reader.mitigation = self.rule(length)
            anywhere.append(needles.ask_at_any_depth(reader, length))
        recent = refined(ask, self.lengths, config.thresholds.lost, config.refine)
        return {"recent": recent, "anywhere": anywhere}

    def _check(self) -> None:
        config, train_length, length = self.config, self.train_length, self.length
        if length <= train_length:
            raise ValueError(
                f"length={length}: must exceed the training length, {train_length}: nothing collapses within "
                f"it; e.g. length={16 * train_length}"
            )
        if config.stride is not None and config.stride > length - train_length:
            raise ValueError(
                f"stride={config.stride}: no state beyond the training length would be measured; at most "
                f"{length - train_length} here"
            )
        if self.bucket > train_length:
            raise ValueError(f"bucket={self.bucket}: exceeds the training length, {train_length}; lower it")
        where = first_non_finite_parameter(self.model)
        if where is not None:
            raise ValueError(
                f"checkpoint={config.checkpoint}: {where} is NaN or infinite: use another checkpoint"
            )


def _write(run_dir: Path, diagnosis: dict[str, Any], measures: Measures) -> list[Path]:
    """Everything into run_dir; returns the figures."""
    write_output(run_dir / "diagnosis.json", to_json(diagnosis))
    curves: dict[str, Any] = {"positions": measures.positions, **measures.values}
    np.savez_compressed(run_dir / "measures.npz", **curves)
    drawn = draw_figures(diagnosis, measures)
    figures = [save(figure, run_dir / "figures" / name) for name, figure in drawn]
    write_output(run_dir / "diagnosis.html", page(diagnosis, measures, figures))
    return figures


def _record(
    tracker: Tracker, numbers: dict[str, float], diagnosis: dict[str, Any], figures: list[Path]
) -> None:
    tracker.log_metrics(numbers, step=0)
    for path in figures:
        tracker.log_artifact(path, "figures")
    for name in ("config.yaml", "diagnosis.json", "diagnosis.html", "measures.npz"):
        tracker.log_artifact(tracker.run_dir / name)
    tracker.set_tags({"collapse_position": str(diagnosis["collapse_position"])})


def _command(config: DiagnoseConfig) -> str:
    """The line that repeats this diagnosis: the settings that decide it and are not the defaults."""
    default = flatten(DiagnoseConfig(checkpoint="-"))
    changed = {
        name: value
        for name, value in flatten(config).items()
        if value != default.get(name) and not name.startswith(FREE_SETTINGS)
    }
    settings = [f"{name}={_as_yaml(value)}" for name, value in changed.items()]
    return shlex.join(["python", "-m", "lightning_modules.diagnose", *settings])


def _as_yaml(value: Any) -> str:
    """A value as a command line takes it: a text without quotes where it is read as itself."""
    if isinstance(value, str) and re.fullmatch(r"[\w./-]+", value) and yaml.safe_load(value) == value:
        return value
    return json.dumps(value)

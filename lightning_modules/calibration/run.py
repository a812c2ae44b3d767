"""One calibration, from config to file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conf.calibrate_schema import CalibrateConfig
from conf.load import to_dict
from conf.schema import TrainConfig
from data.passkey import PasskeyTask
from data.tokenizers import Tokenizer
from kernels.ssd import Mitigation
from lightning_modules.backbone import Mamba2LM
from lightning_modules.calibration.file import Calibration, beside, fingerprint
from lightning_modules.calibration.search import search
from lightning_modules.calibration.statistics import state_norms, threshold_table, time_steps
from lightning_modules.checkpoints import load_model
from lightning_modules.evaluation.loss import held_out_text, prompts_source
from lightning_modules.evaluation.splits import draw_seed
from lightning_modules.evaluation.streaming import Reader, Source
from lightning_modules.measuring import choose_device, show_progress, tokenizer_of, trained_config
from lightning_modules.mitigations import LayerMitigations

SEARCH_FACTOR = 16  # without a setting, the search reads so many training lengths
NORM_POINTS = 64  # without a setting, norms are measured so often a training length
TABLE_STEPS = 2  # entries of the threshold table an octave


def calibrate(config: CalibrateConfig) -> Path:
    """Measure what the mitigation needs, write the file, say what was found. Returns where it is.

    Raises:
        ValueError: the checkpoint, the device, the text or the place of the file cannot be used.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    path = (
        Path(config.output)
        if config.output is not None
        else beside(config.checkpoint, config.mitigation.name)
    )
    device, trained = choose_device(config.device), trained_config(config)
    model = load_model(config.checkpoint, device=device)
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise ValueError(
            f"output={path}: {path.parent} is no folder that can be written: choose another place"
        )
    calibration = measure(config, trained, model, tokenizer_of(config, trained))
    calibration.write(path)
    print("\n".join([*describe(calibration), str(path)]))
    return path


def measure(
    config: CalibrateConfig, trained: TrainConfig, model: Mamba2LM, tokenizer: Tokenizer
) -> Calibration:
    """The calibration of a checkpoint on text of its calibration split."""
    name = config.mitigation.name
    length = trained.data.train_length
    setting = "data.train_length"
    if name in ("delta_scale", "decay_scale"):
        length, setting = config.search.length or SEARCH_FACTOR * length, "search.length"
    source, text = held_out_text(
        trained.data, tokenizer, "calibration", length, config.sequences, config.seed, setting
    )
    ids = source(0, length + 1)  # once: a search reads it many times
    task = Task(
        config,
        model,
        lambda begin, end: ids[:, begin:end],
        length,
        _asked(config, trained, tokenizer, length),
    )
    work = {"state_norm": task.norms, "token_filter": task.filter}.get(name, task.scales)
    section = {"state_norm": "norms", "token_filter": "filter"}.get(name, "search")
    kept = ("seed", "sequences", section)
    return Calibration(
        mitigation=name,
        checkpoint=config.checkpoint,
        weights=fingerprint(model),
        n_layers=trained.model.n_layers,
        n_heads=trained.model.n_heads,
        settings={"text": text, "length": length} | {key: to_dict(config)[key] for key in kept},
        **work(),
    )


def _asked(config: CalibrateConfig, trained: TrainConfig, tokenizer: Tokenizer, length: int) -> torch.Tensor:
    """Which tokens the search's loss is of, (sequences, length) bool: what the checkpoint was trained for.

    Of a task the answers: its filler is best predicted by a model that has forgotten everything.
    """
    if trained.data.name != "passkey":
        return torch.ones(config.sequences, length, dtype=torch.bool)
    task, seed = PasskeyTask(tokenizer, trained.data.passkey), draw_seed(config.seed, "calibration")
    answers = prompts_source(task, trained.data.train_length, config.sequences, seed, field="answer")
    return torch.from_numpy(answers(0, length))


@dataclass(frozen=True)
class Task:
    """Text of `length` tokens, and a model to read it; each method gives a Calibration's findings.

    asked: (sequences, length) bool, the tokens after the first whose loss a search lowers.
    """

    config: CalibrateConfig
    model: Mamba2LM
    source: Source
    length: int
    asked: torch.Tensor

    def norms(self) -> dict[str, Any]:
        stride = self.config.norms.stride or max(1, self.length // NORM_POINTS)
        with self._reader(1) as reader:
            norms = state_norms(reader, self.source, self.length, stride).flatten(0, 1)
        # not torch.quantile, which refuses more than 16 million numbers
        limits = torch.from_numpy(np.quantile(norms.double(), self.config.norms.quantile, 0))
        # a head that inserted nothing has nothing to clip; its limit has to be positive all the same
        limits = limits.clamp(min=torch.finfo(torch.float32).tiny)
        return {"values": _rounded(limits), "found": {"largest": _rounded(norms.amax(0))}}

    def filter(self) -> dict[str, Any]:
        settings, octaves = self.config.filter, self.config.filter.longest.bit_length() - 1
        lengths = [round(self.length * 2 ** (i / TABLE_STEPS)) for i in range(octaves * TABLE_STEPS + 1)]
        with self._reader(1) as reader:
            dt, log_retention = time_steps(reader, self.source, self.length)
        table = threshold_table(dt, log_retention, lengths, settings.retention, settings.clamp)
        found = {"retention": _rounded(log_retention.mean(0).exp())}
        return {"values": _rounded(table), "lengths": lengths, "found": found}

    def scales(self) -> dict[str, Any]:
        name, settings = self.config.mitigation.name, self.config.search
        with self._reader(settings.evaluations) as reader:

            def loss(factors: list[float]) -> float:
                rules = [Mitigation(name, **{name: factor}) for factor in factors]  # type: ignore[arg-type]
                reader.mitigation = LayerMitigations(tuple(rules))
                parts = [part.cpu() for _, part in reader.losses(self.source, self.length)]
                return float(torch.cat(parts, 1)[self.asked].double().mean())

            found = search(
                loss,
                self.model.config.n_layers,
                evaluations=settings.evaluations,
                perturbation=settings.perturbation,
                step=settings.step,
                seed=self.config.seed,
            )
        losses = {"loss": found.loss, "loss_without": found.neutral_loss, "tokens": int(self.asked.sum())}
        return {"values": _rounded(torch.tensor(found.factors)), "found": losses}

    @contextmanager
    def _reader(self, times: int) -> Iterator[Reader]:
        """A reader of the text, `times` over, and its progress bar."""
        with show_progress("calibrating", times * self.config.sequences * self.length) as on_tokens:
            yield Reader(self.model, Mitigation(), self.config.segment, on_tokens)


def describe(calibration: Calibration) -> list[str]:
    """What was found, in lines."""
    name, values = calibration.mitigation, torch.tensor(calibration.values)
    if name == "state_norm":
        low, high = float(values.min()), float(values.max())
        return [f"largest norms: {low:.3g} to {high:.3g} over {values.numel()} heads"]
    if name == "token_filter":
        heads = [f"L{layer}H{head}" for layer, head in values[-1].nonzero().tolist()]
        keeps = f"more than {calibration.settings['filter']['retention']:g} over the training length"
        if not heads:
            return [f"no head keeps {keeps}: token_filter changes nothing"]
        return [f"{len(heads)} of {values[-1].numel()} heads keep {keeps}: {' '.join(heads[:20])}"]
    found, factors = calibration.found, ", ".join(f"{value:.3g}" for value in calibration.values[:20])
    lowered = (
        f"loss {found['loss_without']:.4f} -> {found['loss']:.4f} nats, mean of {found['tokens']:,} tokens"
    )
    return [f"{name} by layer: {factors}", lowered]


def _rounded(values: torch.Tensor) -> list[Any]:
    """Nested lists of six significant digits: a file to be read, and small."""
    if values.dim() > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.6g}") for value in values.tolist()]

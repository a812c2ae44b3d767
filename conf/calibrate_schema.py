"""Settings of `python -m lightning_modules.calibrate`."""

from dataclasses import dataclass
from typing import Any, Literal

from conf.fields import option, require, require_at_least, section


@dataclass(kw_only=True)
class CalibratedMitigationConfig:
    """Whose settings are measured."""

    name: Literal["state_norm", "token_filter", "delta_scale", "decay_scale"] = option(
        "state_norm", "which mitigation is calibrated"
    )


@dataclass(kw_only=True)
class NormsConfig:
    """state_norm: norms of every head's state within the training length."""

    quantile: float = option(1.0, "the limit is this quantile of the norms seen; 1: the largest")
    stride: int | None = option(None, "tokens between measured norms; none: train_length / 64")

    def __post_init__(self) -> None:
        require(0 < self.quantile <= 1, "norms.quantile", self.quantile, "must lie in (0, 1]")
        require(self.stride is None or self.stride >= 1, "norms.stride", self.stride, "must be at least 1")


@dataclass(kw_only=True)
class FilterConfig:
    """token_filter: thresholds of dt by prompt length (LongMamba, arXiv 2504.16053)."""

    retention: float = option(0.05, "of heads that keep more than this of a token over the training length")
    clamp: float = option(0.05, "the largest dt, this share of all, count as the smallest of them")
    longest: int = option(1024, "the table ends at so many training lengths")

    def __post_init__(self) -> None:
        require(0 < self.retention < 1, "filter.retention", self.retention, "must lie between 0 and 1")
        require(0 <= self.clamp < 1, "filter.clamp", self.clamp, "must lie in [0, 1)")
        require_at_least("filter", self, 2, "longest")


@dataclass(kw_only=True)
class SearchConfig:
    """delta_scale, decay_scale: a factor for each layer by zeroth-order search (SPSA) of the loss on held-out
    text longer than in training: of all tokens of documents, of the answers of a task."""

    length: int | None = option(
        None, "tokens of the texts whose loss is lowered; none: 16x the training length"
    )
    evaluations: int = option(60, "how often the loss is measured, the start included")
    perturbation: float = option(0.1, "how far, in log factor, the loss is probed on both sides")
    step: float = option(0.2, "largest change of a log factor in one step; falls to 0 along a cosine")

    def __post_init__(self) -> None:
        require(self.length is None or self.length >= 1, "search.length", self.length, "must be at least 1")
        require_at_least("search", self, 3, "evaluations")
        for name in ("perturbation", "step"):
            require(getattr(self, name) > 0, f"search.{name}", getattr(self, name), "must be positive")


@dataclass(kw_only=True)
class CalibrateConfig:
    """One calibration of one checkpoint."""

    checkpoint: str = option("", "run directory, checkpoint file, or directory of a published model")
    output: str | None = option(None, "the file to write; none: next to the checkpoint")
    seed: int = option(0, "seed of the texts and of the search")
    print_config: bool = option(False, "print the resolved config and stop")
    sequences: int = option(16, "held-out texts, of a split that no evaluation reads")
    segment: int = option(4096, "tokens per forward pass, over all rows: memory grows with it alone")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "device")
    threads: int | None = option(None, "CPU threads; none: all cores")
    data: dict[str, Any] = option(
        {}, "of a checkpoint without a training config: data.train_length=N data.tokenizer=... as in train"
    )
    mitigation: CalibratedMitigationConfig = section(CalibratedMitigationConfig)
    norms: NormsConfig = section(NormsConfig)
    filter: FilterConfig = section(FilterConfig)
    search: SearchConfig = section(SearchConfig)

    def __post_init__(self) -> None:
        require(bool(self.checkpoint), "checkpoint", "", "give a run directory or a .ckpt: checkpoint=PATH")
        require_at_least("config", self, 0, "seed")
        require_at_least("config", self, 1, "sequences", "segment")

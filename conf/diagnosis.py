"""Settings of a diagnosis: what is called by its name, and the probe that watches out for it in training."""

from dataclasses import dataclass
from typing import Literal

from conf.fields import option, require, require_at_least


@dataclass(kw_only=True)
class ThresholdsConfig:
    """From where on a diagnosis calls something by its name; all are recorded beside what was measured."""

    loss_ratio: float = option(2.0, "collapse: loss above so many times its maximum inside")
    solved: float = option(0.9, "exact match at the training length from which a task counts as learned")
    lost: float = option(0.5, "collapse: exact match on recent needles at or below this")
    chance: float = option(0.95, "unsolved language model: loss above this share of a uniform guess's")
    variance_ratio: float = option(4.0, "collapsed head: variance above so many times its maximum inside")
    retention: float = option(0.99, "over-retaining head: keeps more than this over one training length")
    channel_share: float = option(0.5, "outlier channels: a head's top channels hold more of its variance")
    top_channels: float = option(0.01, "share of a head's P x N channels that count as its top ones")

    def __post_init__(self) -> None:
        for name in ("loss_ratio", "variance_ratio"):
            require(getattr(self, name) >= 1, f"thresholds.{name}", getattr(self, name), "must be at least 1")
        for name in ("solved", "lost", "chance", "retention", "channel_share", "top_channels"):
            value = getattr(self, name)
            require(0 < value <= 1, f"thresholds.{name}", value, "must lie in (0, 1]")
        require(self.lost < self.solved, "thresholds.lost", self.lost, f"must be below solved={self.solved}")


@dataclass(kw_only=True)
class ProbeConfig:
    """A look beyond the training length at every validation: collapse/position and others in the metrics."""

    factor: int = option(0, "read so many times the training length, e.g. 8; 0: no probe")
    prompts: int = option(8, "prompts read (documents) or asked at each length (passkey)")

    def __post_init__(self) -> None:
        remedy = "must be 0 for no probe, or at least 2"
        require(self.factor == 0 or self.factor >= 2, "probe.factor", self.factor, remedy)
        require_at_least("probe", self, 1, "prompts")


@dataclass(kw_only=True)
class OverheadConfig:
    """What measuring every head costs beside the forward pass (lightning_modules/diagnosis/overhead.py)."""

    checkpoint: str = option("", "run directory or checkpoint file")
    stride: int = option(1024, "tokens between measured states")
    prompts: int = option(4, "rows read side by side")
    length: int = option(16_384, "tokens of each")
    segment: int = option(4096, "tokens per forward pass, over all rows")
    rounds: int = option(15, "times that either is run, in turn")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "device")
    threads: int | None = option(None, "CPU threads; none: all cores")

    def __post_init__(self) -> None:
        require(bool(self.checkpoint), "checkpoint", "''", "give a run directory or a .ckpt: checkpoint=PATH")
        for name in ("stride", "prompts", "length", "segment", "rounds"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")

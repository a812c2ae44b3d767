"""Settings of the commands that measure a checkpoint: evaluate, diagnose, and what they share."""

from dataclasses import dataclass
from typing import Any, Literal

from conf.bench import bench_mitigations
from conf.diagnosis import ThresholdsConfig
from conf.fields import option, require, require_at_least, section
from conf.mitigation import MitigationConfig
from conf.schema import TrackingConfig
from conf.suites import PerplexityConfig, TaskSuitesConfig, TextConfig
from conf.tasks import TASKS

SUITES = ("passkey", "loss", "states", "perplexity", *TASKS)


@dataclass(kw_only=True)
class PasskeyEvalConfig:
    """Passkey accuracy by length and depth, and with recent needles only."""

    lengths: list[int] = option([], "prompt lengths in tokens; empty: 1x, 2x, ... 64x the training length")
    prompts: int = option(64, "prompts per length with the needle within the last training length (recent)")
    depths: int = option(10, "needle depths per length; 0 skips recall over all depths")
    prompts_per_depth: int = option(8, "prompts per depth")
    max_depth_length: int | None = option(None, "longest length for recall over all depths; none: 16x")
    recent_window: int | None = option(None, "recent: within this many last tokens; none: train_length")

    def __post_init__(self) -> None:
        for length in self.lengths:
            require(length >= 1, "passkey.lengths", self.lengths, "every length must be at least 1")
        require_at_least("passkey", self, 1, "prompts", "prompts_per_depth")
        require_at_least("passkey", self, 0, "depths")


@dataclass(kw_only=True)
class LossEvalConfig:
    """Loss by position on long prompts."""

    length: int | None = option(None, "tokens per prompt; none: 64x the training length")
    max_length: int | None = option(None, "where length is none: no more tokens than this; none: no bound")
    prompts: int = option(4, "prompts averaged")
    bucket: int | None = option(None, "tokens per averaged bucket; none: train_length / 4")

    def __post_init__(self) -> None:
        require_at_least("loss", self, 1, "prompts")
        for name in ("length", "max_length", "bucket"):
            if getattr(self, name) is not None:
                require_at_least("loss", self, 1, name)


@dataclass(kw_only=True)
class StatesEvalConfig:
    """Size of every head's state and its retention, beyond the training length."""

    length: int | None = option(None, "tokens to read; none: 16x the training length")
    prompts: int = option(4, "rows read side by side, averaged")

    def __post_init__(self) -> None:
        require_at_least("states", self, 1, "prompts")


@dataclass(kw_only=True)
class MeasureConfig:
    """What every command that measures one checkpoint takes."""

    checkpoint: str = option("", "run directory, checkpoint file, or directory of a published model")
    run_dir: str | None = option(None, "where results go; none: a new directory under runs/")
    seed: int = option(1, "seed of the prompts")
    print_config: bool = option(False, "print the resolved config and stop")
    segment: int = option(4096, "tokens per forward pass, over all rows: memory grows with it alone")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "device")
    threads: int | None = option(None, "CPU threads; none: all cores")
    data: dict[str, Any] = option(
        {}, "of a checkpoint without a training config: data.train_length=N data.tokenizer=... as in train"
    )
    mitigation: MitigationConfig = section(MitigationConfig)
    tracking: TrackingConfig = section(TrackingConfig)

    def __post_init__(self) -> None:
        require(bool(self.checkpoint), "checkpoint", "", "give a run directory or a .ckpt: checkpoint=PATH")
        require_at_least("config", self, 0, "seed")
        require_at_least("config", self, 1, "segment")


@dataclass(kw_only=True)
class EvaluateConfig(MeasureConfig):
    """One evaluation of one checkpoint."""

    suites: list[str] = option(["passkey", "loss"], f"what to measure: {', '.join(SUITES)}")
    split: Literal["test", "validation"] = option(
        "test", "held-out text: test to report on, validation to choose settings by"
    )
    passkey: PasskeyEvalConfig = section(PasskeyEvalConfig)
    loss: LossEvalConfig = section(LossEvalConfig)
    states: StatesEvalConfig = section(StatesEvalConfig)
    perplexity: PerplexityConfig = section(PerplexityConfig)
    tasks: TaskSuitesConfig = section(TaskSuitesConfig)
    text: TextConfig = section(TextConfig)
    bench: dict[str, Any] = option(
        {}, "mitigation.name=all: mitigation -> settings or lists of them; null leaves it out; else defaults"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        compares = self.mitigation.name == "all"
        require(compares or not self.bench, "bench", list(self.bench), "belongs to mitigation.name=all")
        bench_mitigations(self.bench, train_length=256)  # each setting is checked; the length decides none
        known = bool(self.suites) and set(self.suites) <= set(SUITES)
        require(known, "suites", self.suites, f"choose from [{', '.join(SUITES)}]")
        require(len(set(self.suites)) == len(self.suites), "suites", self.suites, "give each once")
        drawn = bool(set(self.suites) - {"states", "perplexity"})
        remedy = "mitigation.name=all compares curves: add passkey, loss or a task"
        require(drawn or not compares, "suites", self.suites, remedy)


@dataclass(kw_only=True)
class DiagnoseConfig(MeasureConfig):
    """One diagnosis of one checkpoint."""

    length: int | None = option(None, "tokens to stream; none: 16x the training length")
    prompt: Literal["auto", "newline", "sentence", "random", "documents", "passkey"] = option(
        "auto", "what to stream; auto: what the checkpoint was trained on (passkey: the task's filler)"
    )
    prompts: int = option(4, "rows of the prompt, averaged")
    sentence: str = option("The quick brown fox jumps over the lazy dog. ", "what prompt=sentence repeats")
    stride: int | None = option(
        None, "tokens between measured states beyond the training length; none: so that there are about 256"
    )
    bucket: int | None = option(None, "tokens per averaged bucket of loss; none: train_length / 4")
    remembrance: int | None = option(
        None, "length at which effective remembrance is measured, 0: not at all; none: 4x the training length"
    )
    needle_prompts: int = option(32, "of a passkey checkpoint: prompts a length, their needles recent")
    refine: int = option(3, "of a passkey checkpoint: halvings of the interval in which collapse begins")
    thresholds: ThresholdsConfig = section(ThresholdsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("length", "prompts", "stride", "bucket", "needle_prompts"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1")
        require(self.refine >= 0, "refine", self.refine, "must be at least 0")
        require(bool(self.sentence), "sentence", "''", "give a text to repeat")
        name = self.mitigation.name
        require(name != "all", "mitigation.name", name, "a diagnosis is of one; evaluate compares them")
        enough = self.remembrance in (None, 0) or self.remembrance >= 8
        require(enough, "remembrance", self.remembrance, "must be 0, or at least 8 tokens")

    def length_for(self, train_length: int) -> int:
        return self.length or 16 * train_length

    def remembrance_for(self, train_length: int) -> int:
        length = 4 * train_length if self.remembrance is None else self.remembrance
        return min(length, self.length_for(train_length))

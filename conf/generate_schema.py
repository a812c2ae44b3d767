"""Settings of `python -m lightning_modules.generate`, of `model.generate()` and of their benchmark."""

import math
from dataclasses import dataclass
from typing import Literal

from conf.fields import option, require, require_at_least, section
from conf.mitigation import MitigationConfig
from conf.schema import ModelConfig


@dataclass(kw_only=True)
class DecodingConfig:
    """How tokens are chosen and when they end."""

    max_new_tokens: int = option(128, "tokens a prompt at most; 0: only read the prompt (save_state)")
    temperature: float | None = option(None, "divides the logits before sampling; none: the likeliest token")
    top_k: int | None = option(None, "sample among so many likeliest tokens")
    top_p: float | None = option(
        None, "then among the fewest likeliest that together have this probability; in (0, 1]"
    )
    min_p: float | None = option(
        None, "then among those with this share of the likeliest's probability; in (0, 1]"
    )
    stop: list[str] = option([], 'end before the first of these texts, e.g. ["\\n\\n",Question]')
    seed: int = option(0, "of the sampling; the i-th prompt, from 0, uses seed + i")
    segment_length: int = option(4096, "tokens per forward pass over the prompts: memory grows with it alone")
    cuda_graph: bool | None = option(None, "replay each token's step as a CUDA graph; none: on a GPU")

    def __post_init__(self) -> None:
        require_at_least("config", self, 0, "max_new_tokens", "seed")
        require(self.segment_length >= 1, "segment_length", self.segment_length, "must be at least 1")
        if self.temperature is not None:
            remedy = "must be positive and finite; leave it out for the likeliest token"
            require(0 < self.temperature < math.inf, "temperature", self.temperature, remedy)
        for name in ("top_k", "top_p", "min_p"):
            value = getattr(self, name)
            samples = value is None or self.temperature is not None
            require(samples, name, value, "belongs to sampling; set temperature, e.g. temperature=1")
        require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "must be at least 1")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            require(value is None or 0 < value <= 1, name, value, "must lie in (0, 1]")
        require("" not in self.stop, "stop", self.stop, "an empty text stops at once; leave it out")


@dataclass(kw_only=True)
class GenerateConfig(DecodingConfig):
    """One call of the command."""

    checkpoint: str = option("", "run directory, checkpoint file or saved directory")
    prompt: list[str] = option([], "prompt=TEXT, taken as it stands; several times for several prompts")
    prompt_file: str | None = option(
        None, "a text, before each prompt=TEXT if there are any; a .jsonl of prompts; /dev/stdin"
    )
    tokenizer: str | None = option(
        None, "bytes, a tokenizer folder or hub name; none: what the checkpoint was trained with"
    )
    state: str | None = option(None, "go on from this state, saved before by save_state")
    save_state: str | None = option(
        None, "write the state after the last token to this file, e.g. document.state"
    )
    batch_size: int = option(8, "prompts side by side; a prompt's text does not depend on it")
    dtype: Literal["float32", "bfloat16"] = option("float32", "of weights and products; states are fp32")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "device")
    threads: int | None = option(None, "CPU threads; none: all cores")
    print_config: bool = option(False, "print the resolved config and stop")
    mitigation: MitigationConfig = section(MitigationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.checkpoint), "checkpoint", "", "give a run directory or a .ckpt: checkpoint=PATH")
        for name in ("batch_size", "threads"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1")
        self.mitigation.require_single()
        calibrated = self.mitigation.name == "token_filter" and self.mitigation.calibration is not None
        known = not calibrated or self.mitigation.length is not None
        remedy = "calibrated thresholds depend on the number of tokens, prompt and text together; give it"
        require(known, "mitigation.length", None, remedy)
        kept = self.max_new_tokens > 0 or self.save_state is not None
        require(kept, "max_new_tokens", 0, "makes nothing; give save_state=PATH to keep what was read")


@dataclass(kw_only=True)
class GenerationBenchConfig:
    """Speed of a token behind prompts of different lengths, with one model."""

    checkpoint: str | None = option(None, "of this model, or of a guest; none: a new one of the shape below")
    positions: list[int] = option([1024, 1_048_576], "tokens read before the speed is measured")
    tokens: int = option(100, "tokens made in a round, behind each position in turn")
    rounds: int = option(21, "rounds; medians are told")
    batch_size: int = option(1, "rows side by side")
    segment_length: int = option(4096, "tokens per forward pass while prompts are read")
    cuda_graph: bool | None = option(None, "replay each token's step as a CUDA graph; none: on a GPU")
    seed: int = option(0, "of the tokens that are read")
    output: str | None = option(None, "write the numbers to this JSON file")
    dtype: Literal["float32", "bfloat16"] = option("float32", "of weights and products; states are fp32")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "device")
    threads: int | None = option(None, "CPU threads; none: all cores")
    print_config: bool = option(False, "print the resolved config and stop")
    mitigation: MitigationConfig = section(MitigationConfig)
    model: ModelConfig = section(ModelConfig)

    def __post_init__(self) -> None:
        for name in ("tokens", "rounds", "batch_size", "segment_length"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        positive = bool(self.positions) and min(self.positions) >= 1
        require(positive, "positions", self.positions, "give numbers of tokens, at least 1 each")
        require(self.seed >= 0, "seed", self.seed, "must be at least 0")
        self.mitigation.require_single()

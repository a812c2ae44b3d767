"""Settings of `lightning_modules.convert`."""

import re
from dataclasses import dataclass
from typing import Literal

from conf.fields import option, require, require_at_least

SIZE = re.compile(r"[1-9]\d*(\.\d+)?(KB|MB|GB|TB)")


@dataclass(kw_only=True)
class ConvertConfig:
    """One checkpoint, written again in another layout."""

    source: str = option("", "checkpoint in any layout: a directory, a run directory or a file")
    target: str = option("", "directory to write; must not exist yet")
    layout: Literal["ours", "hf", "state-spaces"] = option("ours", "layout to write: ours, hf, state-spaces")
    max_shard_size: str = option("5GB", "layout=hf: largest file of weights, e.g. 500MB")
    parity_tokens: int = option(64, "tokens of each of two rows on which logits are compared; 0: none")
    evaluation: str | None = option(
        None,
        "layout=hf: evaluation.json, or its directory, for the model card; none: newest beside the source",
    )
    diagnosis: str | None = option(
        None,
        "layout=hf: diagnosis.json, or its directory, for the model card; none: newest beside the source",
    )
    print_config: bool = option(False, "print the resolved config and stop")

    def __post_init__(self) -> None:
        require(bool(self.source), "source", "''", "give the checkpoint to convert: source=PATH")
        require(bool(self.target), "target", "''", "give the directory to write: target=DIR")
        sized = SIZE.fullmatch(self.max_shard_size) is not None
        require(sized, "max_shard_size", self.max_shard_size, "must be a size such as 500MB or 5GB")
        require_at_least("config", self, 0, "parity_tokens")
        for name in ("evaluation", "diagnosis"):
            value = getattr(self, name)
            needed = value is None or self.layout == "hf"
            require(needed, name, value, "is for the model card, which only layout=hf writes")

"""Settings of training text: which documents, how they are cleaned, mixed and read."""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from conf.fields import option, require, require_at_least

LARGEST_CYCLE = 10_000  # rows after which a mixture's schedule repeats


@dataclass(kw_only=True)
class MixedSourceConfig:
    """One source of a mixture. Whatever else `data.documents` says holds for all of them."""

    source: str | None = option(None, "as data.documents.source")
    weight: float = option(1.0, "share of the rows, relative to the other sources' weights")
    subset: str | None = option(None, "configuration of a hub dataset, where it has several")
    split: str = option("train", "split of a hub dataset")
    text_field: str = option("text", "field that holds the text in jsonl, parquet and hub datasets")


@dataclass(kw_only=True)
class DocumentsConfig:
    """Long documents: local files, or Hugging Face datasets."""

    source: str | None = option(
        None,
        "file, folder or glob (.txt .py .md .jsonl .jsonl.gz .parquet) or a hub name; none: Python's sources",
    )
    subset: str | None = option(None, "configuration of a hub dataset, where it has several")
    split: str = option("train", "split of a hub dataset")
    text_field: str = option("text", "field that holds the text in jsonl, parquet and hub datasets")
    mixture: list[MixedSourceConfig] = option(
        [], "several sources in place of source: [{source: a.jsonl, weight: 0.7}, {source: b, weight: 0.3}]"
    )
    min_tokens: int = option(1, "documents shorter than this are dropped")
    max_document_tokens: int | None = option(None, "documents longer than this are dropped; none: none is")
    deduplicate: bool = option(
        False, "drop documents whose text came before, but for case, white space and Unicode composition"
    )
    max_tokens: int | None = option(None, "read no more of a source than this many tokens; none: all")
    streaming: bool = option(
        False, "tokenise while training, write nothing; else once, into a cache that all runs share"
    )
    processes: int | None = option(None, "processes that fill the cache; none: one a core")
    layout: Literal["packed", "consecutive"] = option(
        "packed", "packed: document starts reset the state; consecutive: each row continues in the next batch"
    )
    val_fraction: float = option(0.05, "share of the documents held out for validation")

    def __post_init__(self) -> None:
        optional = ("max_tokens", "max_document_tokens", "processes")
        given = (name for name in optional if getattr(self, name) is not None)
        require_at_least("data.documents", self, 1, "min_tokens", *given)
        longest = self.max_document_tokens
        require(
            longest is None or longest >= self.min_tokens,
            "data.documents.max_document_tokens",
            longest,
            f"is below data.documents.min_tokens={self.min_tokens}: no document could pass",
        )
        remedy = "must lie between 0 and 1, e.g. 0.05"
        require(0 < self.val_fraction < 1, "data.documents.val_fraction", self.val_fraction, remedy)
        if self.streaming:
            for name, none in (("deduplicate", False), ("max_tokens", None), ("processes", None)):
                remedy = (
                    f"needs the whole of the documents: not with data.documents.{name}, or streaming=false"
                )
                require(getattr(self, name) == none, "data.documents.streaming", "true", remedy)
        if self.mixture:
            self._check_mixture()

    def _check_mixture(self) -> None:
        name = "data.documents.mixture"
        require(
            self.source is None, "data.documents.source", self.source, f"not beside {name}: name it there"
        )
        remedy = f"rows of {name} alternate between sources, none continues the one before: use packed"
        require(self.layout == "packed", "data.documents.layout", self.layout, remedy)
        weights = [mixed.weight for mixed in self.mixture]
        fine = all(math.isfinite(weight) and weight >= 0 for weight in weights)
        require(fine, f"{name} weights", weights, "each must be a number of at least 0")
        require(sum(weights) > 0, f"{name} weights", weights, "sum to nothing; make at least one positive")
        cycle = sum(whole_weights(weights))
        rows = f"{cycle:,}" if cycle < 10**12 else "over 10^12"
        remedy = f"repeat only after {rows} rows, at most {LARGEST_CYCLE:,} are allowed; round the weights"
        require(cycle <= LARGEST_CYCLE, f"{name} weights", weights, remedy)

    def sources(self) -> list[tuple["DocumentsConfig", int]]:
        """Every source as the config of it alone, and its weight as a whole number above 0."""
        if not self.mixture:
            return [(self, 1)]
        weights = whole_weights([mixed.weight for mixed in self.mixture])
        fields = [{k: v for k, v in vars(mixed).items() if k != "weight"} for mixed in self.mixture]
        pairs = zip(fields, weights, strict=True)
        return [(replace(self, mixture=[], **own), weight) for own, weight in pairs if weight]


def whole_weights(weights: list[float]) -> list[int]:
    """The smallest whole numbers in the exact ratio of the decimal numbers as written."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    return [weight // (math.gcd(*whole) or 1) for weight in whole]

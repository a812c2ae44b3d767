"""Settings of the suites of `evaluate` beyond passkey, loss and states."""

from dataclasses import dataclass
from typing import Any

from conf.fields import option, require, require_at_least
from conf.load import from_dict
from conf.tasks import TasksConfig


@dataclass(kw_only=True)
class TextConfig:
    """A user's own text, through Hugging Face datasets: what perplexity reads and tasks hide needles in."""

    source: str | None = option(
        None,
        "file, folder, glob or hub name, as data.documents.source; none: what training held out",
    )
    subset: str | None = option(None, "configuration of a hub dataset, where it has several")
    split: str = option("test", "split of a hub dataset")
    text_field: str = option("text", "field that holds the text in jsonl, parquet and hub datasets")


@dataclass(kw_only=True)
class TaskSuitesConfig:
    """Every task suite: prompts by length and, where what is asked for has a place, by depth."""

    lengths: list[int] = option([], "prompt lengths in tokens; empty: 1x, 2x, ... 16x the training length")
    depths: int = option(10, "depths per length; prompts of all depths share one text, which is read once")
    prompts_per_depth: int = option(8, "prompts per depth, each of another text")
    settings: dict[str, Any] = option({}, "changes to data.tasks as trained, e.g. tasks.settings.pairs=64")

    def __post_init__(self) -> None:
        for length in self.lengths:
            require(length >= 1, "tasks.lengths", self.lengths, "every length must be at least 1")
        require_at_least("tasks", self, 1, "depths", "prompts_per_depth")
        try:
            from_dict(TasksConfig, dict(self.settings))
        except ValueError as error:
            raise ValueError(f"tasks.settings: {error}") from None


@dataclass(kw_only=True)
class PerplexityConfig:
    """Perplexity by position of whole documents, each read from its beginning."""

    length: int | None = option(
        None, "tokens of a document; none: the most of 1x, 2x, ... 64x that enough documents have"
    )
    documents: int = option(8, "documents, drawn among those long enough")
    bucket: int | None = option(None, "tokens per averaged bucket; none: train_length / 4")

    def __post_init__(self) -> None:
        require_at_least("perplexity", self, 1, "documents")
        for name in ("length", "bucket"):
            if getattr(self, name) is not None:
                require_at_least("perplexity", self, 1, name)

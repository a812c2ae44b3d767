"""Settings of `python -m lightning_modules.harness`."""

from dataclasses import dataclass

from conf.fields import option, require, require_at_least
from conf.measure_schema import MeasureConfig


@dataclass(kw_only=True)
class HarnessConfig(MeasureConfig):
    """One run of lm-evaluation-harness on one checkpoint."""

    tasks: list[str] = option([], "names of the harness' tasks, e.g. [lambada_openai]")
    include_path: str | None = option(None, "folder with further tasks' YAML files")
    num_fewshot: int | None = option(None, "examples before each question; none: the task's own number")
    limit: int | None = option(None, "questions of each task, for a first look; none: all")
    max_length: int | None = option(None, "a request of more tokens is an error; none: any length is read")
    rows: int = option(32, "requests read side by side")
    max_new_tokens: int = option(256, "of a generated answer, where its task has no limit")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.tasks), "tasks", self.tasks, "give the harness' tasks: tasks=[lambada_openai]")
        require_at_least("config", self, 1, "rows", "max_new_tokens")
        for name, least in (("max_length", 2), ("limit", 1), ("num_fewshot", 0)):
            if getattr(self, name) is not None:
                require_at_least("config", self, least, name)
        name = self.mitigation.name
        require(name != "all", "mitigation.name", name, "a run of the harness is of one mitigation")

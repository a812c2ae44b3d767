"""What a preflight looks at, besides the config of the job that it goes before."""

from dataclasses import dataclass

from conf.fields import option, require


@dataclass(kw_only=True)
class PreflightConfig:
    """The checks themselves."""

    free_gib: float = option(5.0, "free disk that the run or study directory needs, in GiB")
    timeout_seconds: float = option(60.0, "what the all-reduce may take, the start of its processes included")

    def __post_init__(self) -> None:
        require(self.free_gib >= 0, "free_gib", self.free_gib, "must be at least 0")
        require(self.timeout_seconds > 0, "timeout_seconds", self.timeout_seconds, "must be positive")

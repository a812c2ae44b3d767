"""How config dataclasses declare their fields and refuse what does not hold."""

from dataclasses import field
from typing import Any


def option(default: Any, help: str) -> Any:
    """A config field with its one-line meaning, which `--help` prints."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def section(cls: type) -> Any:
    """A nested config section, built with its own defaults."""
    return field(default_factory=cls)


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raise one line that names the setting, its value and the remedy unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name}={value}: {remedy}")


def require_at_least(prefix: str, config: object, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= minimum, f"{prefix}.{name}", value, f"must be at least {minimum}")

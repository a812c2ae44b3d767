"""`a.yaml b.yaml key=value ...` -> a checked config dataclass, without importing torch.

YAML files hold differences from the schema's defaults and merge left to right; `key=value` comes last.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

T = TypeVar("T")


def parse(schema: type[T], argv: Sequence[str | Mapping[str, Any]]) -> T:
    """Merge YAML files, `key=value` overrides and {dotted name: value} into `schema` and check the result.

    Raises ValueError with one line that names the setting, its value and the remedy.
    """
    config: Any = OmegaConf.structured(schema)
    try:
        for argument in argv:
            try:
                config = OmegaConf.merge(config, _source(argument))
            except TypeError as error:  # a list where there is a mapping, or the reverse
                raise ValueError(f"{argument}: {error}; see --help") from None
        return OmegaConf.to_object(config)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(_one_line(error)) from None


def to_yaml(config: Any) -> str:
    """The whole resolved config as YAML; `parse` reads it back to an equal config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars: safe inside a checkpoint read with weights_only."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def from_dict(schema: type[T], values: dict[str, Any]) -> T:
    """The inverse of `to_dict`, checked like a command line. Raises ValueError with one line."""
    try:
        config = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(values))
        return OmegaConf.to_object(config)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(_one_line(error)) from None


def flatten(config: Any) -> dict[str, Any]:
    """The config as `section.field` -> value, the names that overrides and search spaces use."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, child in value.items():
                walk(f"{prefix}.{key}" if prefix else key, child)
        else:
            flat[prefix] = value

    walk("", to_dict(config))
    return flat


def from_command_line(
    schema: type[T], usage: str, argv: list[str] | None = None, *, verbatim: str | None = None
) -> T:
    """Parse the command line of an entry point: answers `--help`, `print_config=true` and errors itself.

    verbatim: a list of texts that are taken as they stand, one for each time that the setting is given.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(usage.strip(), "\n\nSettings (key=value), with their defaults:")
        print("\n".join(_help(schema)))
        raise SystemExit(0)
    own = [argument for argument in argv if verbatim and argument.startswith(f"{verbatim}=")]
    texts = [argument.partition("=")[2] for argument in own]
    with user_errors():
        config: Any = parse(schema, [argument for argument in argv if argument not in own])
    if getattr(config, "print_config", False):
        if verbatim and texts:  # as a file would have to hold them: OmegaConf reads ${...} as a reference
            config = dataclasses.replace(config, **{verbatim: [t.replace("${", "\\${") for t in texts]})
        print(to_yaml(dataclasses.replace(config, print_config=False)), end="")
        raise SystemExit(0)
    return dataclasses.replace(config, **{verbatim: texts}) if verbatim and texts else config


class user_errors:
    """Turn a ValueError, our word for a user's mistake, into one line and exit status 2."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError):
            die(str(error))


def die(message: str) -> NoReturn:
    """Print one `error: ...` line and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _source(argument: str | Mapping[str, Any]) -> DictConfig | ListConfig:
    if isinstance(argument, Mapping):
        config = OmegaConf.create()
        for name, value in argument.items():
            OmegaConf.update(config, name, value, force_add=True)
        return config
    if argument.startswith("-"):
        raise ValueError(f"{argument}: options are written key=value, without dashes; see --help")
    if "=" in argument:
        return OmegaConf.from_dotlist([argument])
    if not argument.endswith((".yaml", ".yml")):
        raise ValueError(f"{argument}: neither a .yaml file nor key=value; see --help")
    if not Path(argument).is_file():
        raise ValueError(f"{argument}: no such config file")
    try:
        return OmegaConf.load(argument)
    except YAMLError as error:
        raise ValueError(f"{argument}: not valid YAML: {' '.join(str(error).split())}") from None


def _one_line(error: OmegaConfBaseException) -> str:
    """OmegaConf's message carries the key and the types on further lines; keep what a user needs."""
    message = str(error).split("\n")[0].rstrip(".")
    key = getattr(error, "full_key", None)
    return f"{key}: {message}; see --help" if key else f"{message}; see --help"


def _help(schema: type, prefix: str = "") -> list[str]:
    """A line a setting, sections behind the settings beside them."""
    lines, sections = [], []
    for field in dataclasses.fields(schema):
        name = f"{prefix}{field.name}"
        default = field.default_factory() if callable(field.default_factory) else field.default
        if dataclasses.is_dataclass(field.type) and isinstance(field.type, type):
            sections += ["", f"{name}: {(field.type.__doc__ or '').splitlines()[0]}"]
            sections += _help(field.type, f"{name}.")
        else:
            lines.append(f"  {name + '=' + str(default):<44} {field.metadata.get('help', '')}")
    return lines + sections

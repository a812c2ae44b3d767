"""The texts that a command is to read, from its line and from files. Imports no torch."""

import json
from dataclasses import dataclass
from pathlib import Path

from conf.generate_schema import GenerateConfig


@dataclass(frozen=True)
class Prompts:
    """document: read once, before every prompt. as_json: each continuation as a line of JSON."""

    prompts: list[str]
    document: str | None
    as_json: bool


def read_texts(config: GenerateConfig) -> Prompts:
    """Raises ValueError (one line) where there is nothing to read, or it cannot be read."""
    if config.prompt_file is None:
        if not config.prompt:
            raise ValueError("prompt: give one: prompt=TEXT, or prompt_file=PATH")
        found = Prompts(config.prompt, None, len(config.prompt) > 1)
    elif config.prompt_file.endswith(".jsonl"):
        if config.prompt:
            raise ValueError(f"prompt_file={config.prompt_file}: holds the prompts; leave prompt= out")
        found = Prompts(_lines(config.prompt_file), None, True)
    elif config.prompt:
        found = Prompts(config.prompt, _text(config.prompt_file), len(config.prompt) > 1)
    else:
        found = Prompts([_text(config.prompt_file)], None, False)
    for text in [*found.prompts, *([] if found.document is None else [found.document])]:
        _require_readable(text)
    most = config.batch_size
    if config.save_state is not None and len(found.prompts) > most:
        raise ValueError(
            f"save_state={config.save_state}: {len(found.prompts)} prompts in batches of {most} leave "
            f"several states; set batch_size={len(found.prompts)}"
        )
    return found


def _require_readable(text: str) -> None:
    if text == "":
        raise ValueError("prompt: an empty text: there is nothing to go on from; give at least a character")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of a command line that are no UTF-8, half a pair in JSON
        raise ValueError(
            f"prompt={ascii(text)[1:60]}: character {error.start} is not Unicode text; write it as UTF-8"
        ) from None


def _text(name: str) -> str:
    try:
        return Path(name).read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"prompt_file={name}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt_file={name}: not UTF-8 text (byte {error.start}); convert it") from None


def _lines(name: str) -> list[str]:
    """A prompt a line: a JSON text, or an object with one as `prompt`."""
    prompts = []
    # Only a newline ends a line: JSON texts may hold the others of Unicode as they are.
    for number, line in enumerate(_text(name).removeprefix("\ufeff").split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            prompt = value["prompt"] if isinstance(value, dict) else value
        except (json.JSONDecodeError, KeyError, RecursionError):
            prompt = None
        if not isinstance(prompt, str):
            raise ValueError(
                f'prompt_file={name}: line {number} is neither a JSON text nor {{"prompt": "..."}}'
            )
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"prompt_file={name}: holds no prompt; write a JSON text on each line")
    return prompts

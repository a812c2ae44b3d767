"""The tokenizer beside a converted model."""

import json
import shutil
from pathlib import Path
from typing import Any

from conf.schema import TrainConfig

NAMES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja"),
)
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def carry(source: Path, trained: TrainConfig | None, target: Path) -> str:
    """Put the source's tokenizer into `target`; returns what it was, in words.

    Its files where the source has them, else the one that the model was trained with.
    """
    folder = source if source.is_dir() else source.parent
    if has_tokenizer(folder):
        for name in NAMES:
            if (folder / name).is_file():
                shutil.copy(folder / name, target / name)
        return "the source's"
    if trained is None:
        return "none known"
    if trained.data.tokenizer == "bytes":
        _write_bytes(target)
        return "bytes"
    _load(trained.data.tokenizer, "the training's").save_pretrained(target)
    return f"{trained.data.tokenizer}, of the training"


def special_ids(folder: Path) -> dict[str, int | None]:
    """bos_token_id, eos_token_id and pad_token_id of the tokenizer in `folder`; {} without one."""
    if not has_tokenizer(folder):
        return {}
    tokenizer = _load(folder, "copied from the source")
    return {name: getattr(tokenizer, name) for name in SPECIAL}


def _load(name: str | Path, whose: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a missing or damaged file shows as almost any
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise ValueError(
            f"tokenizer: {whose}, {name}, cannot be read ({reason}): put its files back as they were"
        ) from None


def _write_bytes(folder: Path) -> None:
    """`data.tokenizer=bytes` as a tokenizer of transformers: id n is byte n, byte 0 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # Byte-level tokenizers write a byte as a visible letter: itself where it has one, else from 256 on.
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in letters.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, str | bool] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": letters[0]}
    settings["clean_up_tokenization_spaces"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

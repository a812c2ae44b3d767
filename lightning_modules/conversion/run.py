"""One conversion from config to directory: read, check, write, read again, compare, move into place."""

import fcntl
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from conf.conversion import ConvertConfig
from conf.load import flatten
from lightning_modules.conversion import huggingface, ours, parity, state_spaces, tokenizer_files
from lightning_modules.conversion.card import write_card
from lightning_modules.conversion.parameters import Parameters
from lightning_modules.conversion.published import is_published, layout_of
from lightning_modules.measuring import to_json
from lightning_modules.saying import say

LAYOUTS: dict[str, Any] = {"ours": ours, "hf": huggingface, "state-spaces": state_spaces}
MARGIN = 64 * 2**20  # bytes that stay free
TRANSFORMERS = "transformers.Mamba2ForCausalLM"


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Write config.target, whole or not at all; returns the contents of its parity.json.

    Raises ValueError (one line) where the source does not hold, the layout cannot express it, or the target
    exists, does not fit on the disk, or is not the same model.
    """
    source, target = Path(config.source), Path(config.target)
    if not os.path.exists(source):
        raise ValueError(f"source={source}: no such file or directory")
    if os.path.islink(target):
        raise ValueError(f"target={target}: is a link: give a new directory")
    if os.path.exists(target) and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"target={target}: exists and is never overwritten: give a new directory")
    source_layout = layout_of(source) if is_published(source) else "ours"
    parameters: Parameters = LAYOUTS[source_layout].read(source)
    LAYOUTS[config.layout].require_expressible(parameters.config)
    for note in parameters.notes:
        say(f"note: {source}: {note}")
    with _room(target, parameters) as place:
        try:
            report = _write(config, source, source_layout, parameters, place)
            os.replace(place, target)
        except OSError as error:
            raise _unwritable(target, error) from None
    say(_summary(report))
    return report


def _write(
    config: ConvertConfig, source: Path, source_layout: str, parameters: Parameters, place: Path
) -> dict[str, Any]:
    """Everything into the directory `place`; returns the report."""
    layout = LAYOUTS[config.layout]
    tokenizer = tokenizer_files.carry(source, parameters.trained, place)
    further = {}
    if config.layout == "hf":
        further = {"special_ids": tokenizer_files.special_ids(place)}
    try:
        files = layout.write(parameters, place, config.max_shard_size, **further)
    # A full disk is each library's own error.
    except (SafetensorError, RuntimeError) as error:
        raise _unwritable(config.target, error) from None
    reread: Parameters = layout.read(place)
    _require_equal(parameters, reread)
    report = {
        "source": str(source),
        "source_layout": source_layout,
        "target_layout": config.layout,
        "notes": parameters.notes,
        "model": flatten(parameters.config),
        "parameters": sum(value.numel() for value in parameters.weights.values()),
        "tensors": len(parameters.weights),
        "dtypes": sorted({str(value.dtype)[6:] for value in parameters.weights.values()}),
        "sha256": reread.checksum(),
        "files": files,
        "tokenizer": tokenizer,
        "tokens": [parity.ROWS, config.parity_tokens],
        "comparisons": _compare(config, source, source_layout, parameters, reread, place),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    if config.layout == "hf":
        write_card(config, source, parameters, report, place)
    (place / "parity.json").write_text(to_json(report))
    for name in files:  # safetensors writes files that nobody else may read
        (place / name).chmod((place / "parity.json").stat().st_mode)
    return report


def _compare(
    config: ConvertConfig,
    source: Path,
    source_layout: str,
    parameters: Parameters,
    reread: Parameters,
    place: Path,
) -> list[dict[str, Any]]:
    if config.parity_tokens == 0:
        return []
    ids = parity.fixed_tokens(parameters.config.vocab_size, config.parity_tokens)
    logits = parity.our_logits(parameters, ids)
    pairs = [("the target, read again", parity.our_logits(reread, ids))]
    if source_layout == "hf":
        pairs.append((f"{TRANSFORMERS} of the source", parity.transformers_logits(source, ids)))
    if config.layout == "hf":
        pairs.append((f"{TRANSFORMERS} of the target", parity.transformers_logits(place, ids)))
    return [parity.compare("the source", logits, name, other).as_dict() for name, other in pairs]


def _require_equal(ours_: Parameters, theirs: Parameters) -> None:
    """Bit for bit: whatever else a layout does, it moves no weight."""
    if ours_.checksum() != theirs.checksum():
        raise ValueError("the target, read again, holds other weights than the source: nothing was written")


@contextmanager
def _room(target: Path, parameters: Parameters) -> Iterator[Path]:
    """An empty directory beside the target, on a disk that holds it all, for this process alone.

    It is gone in the end, and so are directories above it that were made for it and hold nothing; what a kill
    left is cleared.
    """
    place = Path(os.path.abspath(target))
    place = place.with_name(f".{place.name}.converting")
    made = [folder for folder in place.parents if not os.path.exists(folder)]
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = os.open(place, os.O_RDONLY)
    except OSError as error:
        raise _unwritable(target, error) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours_ = os.path.samestat(os.fstat(lock), os.stat(place))  # not moved by who held the lock before
        except OSError:
            ours_ = False
        if not ours_:
            raise ValueError(f"target={target}: another conversion is writing it: wait for it")
        try:
            for left in place.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            _require_room(target, place, parameters)
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
            for folder in made:
                with suppress(OSError):  # it holds the target
                    folder.rmdir()
    finally:
        os.close(lock)


def _require_room(target: Path, place: Path, parameters: Parameters) -> None:
    free, needed = shutil.disk_usage(place).free, parameters.nbytes + MARGIN
    if free < needed:
        raise ValueError(
            f"target={target}: needs {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free: "
            "make room or choose another disk"
        )


def _unwritable(target: object, error: Exception) -> ValueError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
    return ValueError(f"target={target}: cannot be written ({reason})")


def _summary(report: dict[str, Any]) -> str:
    lines = [
        f"{report['source_layout']} -> {report['target_layout']}: {report['tensors']} tensors, "
        f"{report['parameters']:,} parameters, {', '.join(report['dtypes'])}",
        f"weights: read again bit for bit, sha256 {report['sha256'][:16]}",
        f"tokenizer: {report['tokenizer']}",
    ]
    if report["comparisons"]:
        rows, length = report["tokens"]
        lines.append(f"logits on {rows} x {length} fixed tokens, fp32:")
    for found in report["comparisons"]:
        lines.append(
            f"  {found['first']} and {found['second']}: largest difference {found['max_difference']:.3g} "
            f"(largest logit {found['largest_logit']:.3g})"
        )
    return "\n".join(lines)

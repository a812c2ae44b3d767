"""Where documents come from: local files, a dataset on the hub, or Python's own standard library.

Nothing here holds more than one document in memory: text files are read one by one, jsonl line by line, and
parquet files and hub datasets are streamed by Hugging Face `datasets`.
"""

import contextlib
import glob
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.schema import DocumentsConfig
from data.tokenizers import HUB_NAME

TEXT_FILES = (".txt", ".py", ".md")
EXTENSIONS = (*TEXT_FILES, ".jsonl", ".parquet")
INSTALLED_PACKAGES = {"site-packages", "dist-packages"}


@dataclass
class Corpus:
    """The documents that a config names: `files` in sorted order, or a hub dataset when there are none."""

    config: DocumentsConfig
    files: tuple[Path, ...]
    not_utf8: list[Path] = field(default_factory=list)  # text files that `texts` had to leave out

    def identity(self) -> list[Any]:
        """What the texts depend on, without reading them: equal identities give equal texts."""
        if not self.files:
            return [self.config.source, self.config.subset, self.config.split, self.config.text_field]
        stats = [(path, path.stat()) for path in self.files]
        return [self.config.text_field, [(str(path), s.st_size, s.st_mtime_ns) for path, s in stats]]

    def texts(self) -> Iterator[str]:
        """Every document, in a fixed order."""
        if not self.files:
            yield from self._from_hub()
        for path in self.files:
            if path.suffix == ".jsonl":
                yield from self._from_jsonl(path)
            elif path.suffix == ".parquet":
                yield from self._from_parquet(path)
            else:
                yield from self._from_text(path)

    def _from_text(self, path: Path) -> Iterator[str]:
        with _one_line_error(str(path)):
            try:
                yield path.read_text("utf-8")
            except UnicodeDecodeError:
                self.not_utf8.append(path)

    def _from_jsonl(self, path: Path) -> Iterator[str]:
        # By hand: `datasets` infers a schema of all fields, and fails where one we do not read changes type.
        with _one_line_error(str(path)), open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    with _one_line_error(f"{path}, line {number},"):
                        yield from self._field([json.loads(line)], f"{path}, line {number},")

    def _from_parquet(self, path: Path) -> Iterator[str]:
        from datasets import load_dataset

        with _one_line_error(str(path)):
            dataset = load_dataset("parquet", data_files=[str(path)], split="train", streaming=True)
            yield from self._field(dataset, str(path))

    def _from_hub(self) -> Iterator[str]:
        from datasets import load_dataset

        source, subset, split = self.config.source, self.config.subset, self.config.split
        with _one_line_error(f"{source} is no file or folder here, and the hub dataset"):
            dataset = load_dataset(source, subset, split=split, streaming=True)
            yield from self._field(dataset, f"{source}")

    def _field(self, rows: Iterable[Any], where: str) -> Iterator[str]:
        """The text of every row; rows whose text is null are no documents."""
        name = self.config.text_field
        for row in rows:
            if not isinstance(row, dict) or name not in row:
                fields = sorted(row) if isinstance(row, dict) else "rows of named fields"
                raise ValueError(
                    f"data.documents.text_field={name}: {where} has no such field; choose from {fields}"
                )
            text = row[name]
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"data.documents.text_field={name}: {where} holds {type(text).__name__} there, not text; "
                    f"choose from {sorted(row)}"
                )
            if text is not None:
                yield text


def locate(config: DocumentsConfig) -> Corpus:
    """Find the files that `data.documents.source` names, without reading them.

    Raises:
        ValueError: nothing there, or nothing that we read.
    """
    source = config.source
    if source is None:
        return Corpus(config, _find_standard_library())
    path = Path(source).expanduser()
    if path.is_dir():
        files = _search(path, EXTENSIONS, skip=set())
    elif path.exists():
        files = [path]
    elif glob.has_magic(source):
        found = glob.glob(str(path), recursive=True)
        files = [Path(p) for p in found if os.path.isfile(p) and p.endswith(EXTENSIONS)]
    elif HUB_NAME.fullmatch(source) and path.suffix not in EXTENSIONS:
        return Corpus(config, ())
    else:
        raise ValueError(
            f"data.documents.source={source}: no such file or folder; give a file, folder, glob or hub name"
        )
    unknown = [file for file in files if file.suffix not in EXTENSIONS]
    if unknown or not files:
        raise ValueError(
            f"data.documents.source={source}: holds none of {' '.join(EXTENSIONS)}; give such files"
        )
    return Corpus(config, tuple(sorted(file.absolute() for file in files)))


def _find_standard_library() -> tuple[Path, ...]:
    """The .py files of the running Python's standard library, its tests included."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = _search(folder, (".py",), skip=INSTALLED_PACKAGES)
    if not files:
        raise ValueError(
            f"data.documents.source=null: this Python has no sources in {folder}; name a file or folder"
        )
    return tuple(sorted(files))


def _search(folder: Path, extensions: tuple[str, ...], skip: set[str]) -> list[Path]:
    """Files below `folder`, without hidden files and folders."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        found += [
            Path(root, name) for name in names if name.endswith(extensions) and not name.startswith(".")
        ]
    return found


@contextlib.contextmanager
def _one_line_error(where: str) -> Iterator[None]:
    """Name what was being read in errors of json, pyarrow, `datasets` and the hub; our own pass unchanged."""
    try:
        yield
    except Exception as error:
        if type(error) is ValueError and str(error).startswith("data."):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"data.documents.source: {where} cannot be read ({reason}); mend it or name another source"
        ) from None

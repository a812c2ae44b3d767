"""Where documents come from: local files, a dataset on the hub, or Python's own standard library.

A corpus divides into pieces, which several processes can read side by side: some text files, the lines that
begin in a range of a jsonl file's bytes, row groups of a parquet file, or a shard of a hub dataset. Nothing
here holds more than one document, or a few rows of parquet; `datasets` of Hugging Face streams from the hub.
"""

import contextlib
import glob
import gzip
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from conf.documents import DocumentsConfig
from data.tokenizers import HUB_NAME

TEXT_FILES = (".txt", ".py", ".md")
ZIPPED_LINES = (".jsonl.gz", ".json.gz")
EXTENSIONS = (*TEXT_FILES, ".jsonl", *ZIPPED_LINES, ".parquet")
INSTALLED_PACKAGES = {"site-packages", "dist-packages"}
PARQUET_ROWS = 16  # decoded at once


@dataclass(frozen=True)
class Span:
    """Bytes of jsonl, row groups of parquet, all of another file; without a path a hub dataset's shard."""

    path: Path | None
    start: int
    stop: int
    size: int  # bytes, 0 where nobody knows


Piece = tuple[Span, ...]


@dataclass
class Corpus:
    """The documents of one source: `files` in sorted order, or a hub dataset when there are none."""

    config: DocumentsConfig
    files: tuple[Path, ...]
    not_utf8: list[Path] = field(default_factory=list)  # text files that reading had to leave out

    @property
    def name(self) -> str:
        return self.config.source or "Python's standard library"

    def identity(self) -> list[Any]:
        """What the texts depend on, without reading them: equal identities give equal texts."""
        if not self.files:
            return [self.config.source, self.config.subset, self.config.split, self.config.text_field]
        stats = [(path, path.stat()) for path in self.files]
        return [self.config.text_field, [(str(path), s.st_size, s.st_mtime_ns) for path, s in stats]]

    @cached_property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files)

    def pieces(self, size: int) -> list[Piece]:
        """The whole corpus in order, in pieces of about `size` bytes. Opens parquet files and the hub."""
        pieces: list[Piece] = []
        piece: list[Span] = []
        for span in self._spans(size):
            piece.append(span)
            if span.path is None or sum(s.size for s in piece) >= size:
                pieces.append(tuple(piece))
                piece = []
        return [*pieces, tuple(piece)] if piece else pieces

    def texts(self) -> Iterator[str]:
        """Every document, in a fixed order."""
        for piece in self.pieces(2**30):
            yield from self.read(piece)

    def read(self, piece: Piece) -> Iterator[str]:
        """The documents of a piece, in a fixed order."""
        for span in piece:
            if span.path is None:
                yield from self._from_hub(span)
            elif span.path.name.endswith(".jsonl"):
                yield from self._from_jsonl(span.path, span.start, span.stop)
            elif span.path.name.endswith(ZIPPED_LINES):
                yield from self._from_zipped(span.path)
            elif span.path.suffix == ".parquet":
                yield from self._from_parquet(span.path, span.start, span.stop)
            else:
                yield from self._from_text(span.path)

    def _spans(self, size: int) -> Iterator[Span]:
        if not self.files:
            with _one_line_error(lambda: self._hub_name):
                count = self._hub.num_shards
            yield from (Span(None, i, count, 0) for i in range(count))
        for path in self.files:
            total = path.stat().st_size
            if path.name.endswith(".jsonl"):
                parts = max(1, -(-total // size))
                for i in range(parts):
                    start, stop = total * i // parts, total * (i + 1) // parts
                    yield Span(path, start, stop, stop - start)
            elif path.suffix == ".parquet":
                yield from self._row_groups(path, size)
            else:
                yield Span(path, 0, total, total)

    def _row_groups(self, path: Path, size: int) -> Iterator[Span]:
        with _one_line_error(lambda: str(path)), _open_parquet(path) as file:
            start = held = 0
            for i in range(file.num_row_groups):
                held += file.metadata.row_group(i).total_byte_size
                if held >= size or i == file.num_row_groups - 1:
                    yield Span(path, start, i + 1, held)
                    start, held = i + 1, 0

    def _from_text(self, path: Path) -> Iterator[str]:
        with _one_line_error(lambda: str(path)):
            try:
                yield path.read_text("utf-8")
            except UnicodeDecodeError:
                self.not_utf8.append(path)

    def _from_jsonl(self, path: Path, start: int, stop: int) -> Iterator[str]:
        """Of the lines that begin at bytes [start, stop)."""
        # By hand: `datasets` infers a schema of all fields, and fails where one we do not read changes type.
        with _one_line_error(lambda: str(path)), open(path, "rb") as file:
            if start:
                file.seek(start - 1)
                file.readline()  # the rest of a line that began before
            position = file.tell()
            while position < stop and (line := file.readline()):
                yield from self._from_line(line, partial(_name_line_at, path, position))
                position += len(line)

    def _from_zipped(self, path: Path) -> Iterator[str]:
        with _one_line_error(lambda: str(path)), gzip.open(path) as file:
            for number, line in enumerate(file, 1):
                yield from self._from_line(line, partial("{}, line {},".format, path, number))

    def _from_line(self, line: bytes, where: Callable[[], str]) -> Iterator[str]:
        if line.strip():
            with _one_line_error(where):
                yield from self._field([json.loads(line.decode("utf-8"))], where)

    def _from_parquet(self, path: Path, start: int, stop: int) -> Iterator[str]:
        with _one_line_error(lambda: str(path)), _open_parquet(path) as file:
            name, names = self.config.text_field, file.schema_arrow.names
            columns = [name] if name in names else names
            batches = file.iter_batches(PARQUET_ROWS, row_groups=range(start, stop), columns=columns)
            for batch in batches:
                if name in names:
                    yield from self._texts(batch.column(0).to_pylist(), names, lambda: str(path))
                else:
                    yield from self._field(batch.to_pylist(), lambda: str(path))

    @cached_property
    def _hub(self) -> Any:
        from datasets import load_dataset

        return load_dataset(self.config.source, self.config.subset, split=self.config.split, streaming=True)

    @property
    def _hub_name(self) -> str:
        return f"{self.config.source} is no file or folder here, and the hub dataset"

    def _from_hub(self, span: Span) -> Iterator[str]:
        with _one_line_error(lambda: self._hub_name):
            shard = self._hub if span.stop == 1 else self._hub.shard(num_shards=span.stop, index=span.start)
            yield from self._field(shard, lambda: f"{self.config.source}")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_hub"}

    def _field(self, rows: Iterable[Any], where: Callable[[], str]) -> Iterator[str]:
        """The text of every row; rows whose text is null are no documents."""
        name = self.config.text_field
        for row in rows:
            if not isinstance(row, dict) or name not in row:
                fields = sorted(row) if isinstance(row, dict) else "rows of named fields"
                raise ValueError(
                    f"data.documents.text_field={name}: {where()} has no such field; choose from {fields}"
                )
            yield from self._texts([row[name]], row, where)

    def _texts(self, values: list[Any], fields: Iterable[str], where: Callable[[], str]) -> Iterator[str]:
        for text in values:
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"data.documents.text_field={self.config.text_field}: {where()} holds "
                    f"{type(text).__name__} there, not text; choose from {sorted(fields)}"
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
    elif HUB_NAME.fullmatch(source) and not source.endswith(EXTENSIONS):
        return Corpus(config, ())
    else:
        raise ValueError(
            f"data.documents.source={source}: no such file or folder; give a file, folder, glob or hub name"
        )
    gone = [file for file in files if not file.is_file()]
    if gone:
        raise ValueError(f"data.documents.source={source}: {gone[0]} links to nothing; remove or mend it")
    unknown = [file for file in files if not file.name.endswith(EXTENSIONS)]
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


def _open_parquet(path: Path) -> Any:
    from pyarrow.parquet import ParquetFile

    return ParquetFile(path)


def _name_line_at(path: Path, start: int) -> str:
    """The number of the line at byte `start`: only an error message asks, so no reader counts."""
    with open(path, "rb") as file:
        before = sum(file.read(min(2**20, start - at)).count(b"\n") for at in range(0, start, 2**20))
    return f"{path}, line {before + 1},"


@contextlib.contextmanager
def _one_line_error(where: Callable[[], str]) -> Iterator[None]:
    """Name what was being read in errors of json, pyarrow, `datasets` and the hub; our own pass unchanged."""
    try:
        yield
    except Exception as error:
        if type(error) is ValueError and str(error).startswith("data."):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"data.documents.source: {where()} cannot be read ({reason}); mend it or name another source"
        ) from None

"""Every kind of source gives its documents, and every mistake one line."""

import json
import os
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from conf.schema import DocumentsConfig
from data.sources import locate


def read(source: object, **options: object) -> list[str]:
    return list(locate(DocumentsConfig(source=str(source), **options)).texts())


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def write_parquet(path: Path, **columns: list[object]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_folder_holds_every_kind_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("plain é\n")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "c.md").write_text("# mark")
    write_jsonl(tmp_path / "a.jsonl", [{"text": "row 1"}, {"text": None}, {"text": "row 2"}])
    write_parquet(tmp_path / "z.parquet", n=[1, 2], text=["cell 1", "cell 2"])
    for ignored in ("image.png", ".hidden.txt", ".git/x.md"):
        (tmp_path / ignored).parent.mkdir(exist_ok=True)
        (tmp_path / ignored).write_text("no")
    assert read(tmp_path) == ["row 1", "row 2", "plain é\n", "# mark", "cell 1", "cell 2"]
    assert read(tmp_path / "*.txt") == ["plain é\n"]
    assert read(tmp_path / "**" / "*.md") == ["# mark"]
    assert read(tmp_path / "z.parquet") == ["cell 1", "cell 2"]
    assert read(str(tmp_path / "b.txt")) == ["plain é\n"]


def test_rows_may_differ_in_fields_that_are_not_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "1", "meta": 1}, {"text": "2", "meta": {"x": []}}])
    assert read(path) == ["1", "2"]
    assert read(write_jsonl(tmp_path / "b.jsonl", [{"body": "1"}]), text_field="body") == ["1"]


def test_text_that_is_not_utf8_is_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_text("good")
    corpus = locate(DocumentsConfig(source=str(tmp_path)))
    assert list(corpus.texts()) == ["good"]
    assert corpus.not_utf8 == [tmp_path / "a.txt"]


def test_identity_changes_with_the_files_and_the_field(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")

    def identity(**options: str) -> object:
        return locate(DocumentsConfig(source=str(tmp_path), **options)).identity()

    first = identity()
    assert identity() == first
    assert identity(text_field="body") != first
    os.utime(file, ns=(1, 1))
    assert identity() != first


def test_default_is_the_standard_library() -> None:
    files = locate(DocumentsConfig()).files
    names = {file.name for file in files}
    assert len(files) > 500
    assert {"argparse.py", "tarfile.py", "decoder.py"} <= names
    assert not any("site-packages" in file.parts for file in files)
    assert {file.suffix for file in files} == {".py"}


def test_hub_dataset_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    read_rows = []

    def rows():
        for i in range(1000):
            read_rows.append(i)
            yield {"id": i, "body": f"document {i}"}

    def load_dataset(
        name: str, subset: str | None, *, split: str, streaming: bool
    ) -> datasets.IterableDataset:
        assert (name, subset, split, streaming) == ("someone/books", "en", "validation", True)
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DocumentsConfig(source="someone/books", subset="en", split="validation", text_field="body")
    texts = locate(config).texts()
    assert [next(texts) for _ in range(3)] == ["document 0", "document 1", "document 2"]
    texts.close()
    assert len(read_rows) < 1000


def test_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = r"^data\.documents\.source: nobody/books is no file.*\(Couldn't reach the Hub\); [^\n]*$"
    with pytest.raises(ValueError, match=message):
        read("nobody/books")


@pytest.mark.parametrize("source", ["./books", "../books", "/no/books", "~/no/books", "some/books.jsonl"])
def test_a_path_to_nothing_is_no_hub_name(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^data\.documents\.source={source}: no such file or folder; "):
        locate(DocumentsConfig(source=source))
    assert locate(DocumentsConfig(source="some/books")).files == ()  # a hub name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("", None, r"source=.*holds none of \.txt"),
        ("missing/", None, "source=.*no such file or folder"),
        ("missing.txt", None, "source=.*no such file or folder"),
        ("*.md", None, "source=.*holds none of"),
        ("a.csv", b"x", "source=.*holds none of"),
        ("a.jsonl", b'{"text": "1"}\n{"text": oops\n', r"source: .*a\.jsonl, line 2, cannot be read"),
        ("a.jsonl", b'"text"', r"text_field=text: .*a\.jsonl, line 1, has no such field"),
        (
            "a.jsonl",
            b'{"body": "1", "id": 2}',
            r"text_field=text: .* no such field; choose from \['body', 'id'\]",
        ),
        ("a.jsonl", b'{"text": 1}', "text_field=text: .* holds int there, not text"),
        ("a.jsonl", b'{"text": "\xe9"}', r"source: .*a\.jsonl, line 1, cannot be read"),
        ("a.parquet", b"not parquet", r"source: .*a\.parquet cannot be read"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^data\.documents\.{message}") as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)
    assert type(error.value) is ValueError


def test_parquet_without_the_field_names_its_columns(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", body=["x"], n=[1])
    with pytest.raises(ValueError, match=r"text_field=text: .*a\.parquet has no such field.*\['body', 'n'\]"):
        read(path)


def test_a_dangling_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"gone\.txt links to nothing"):
        locate(DocumentsConfig(source=str(tmp_path)))

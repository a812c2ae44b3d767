"""Tokenising at scale: several processes, resumed, filtered, without duplicates, in bounded memory."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from conf.documents import DocumentsConfig
from data import parts, store
from data.arrow import ArrowTokens, write_arrow
from data.sources import locate
from data.store import TokenStore, build_store, kept_line
from data.tokenizers import ByteTokenizer, load_tokenizer
from tests.data.test_store import read_documents

ROOT = Path(__file__).parents[2]
BYTES = ByteTokenizer()


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def build(source: Path, **options: object) -> TokenStore:
    return build_store(locate(DocumentsConfig(source=str(source), **options)), BYTES)


def same_files(one: TokenStore, two: TokenStore) -> bool:
    names = ("tokens.arrow", "ends.npy", "hashes.npy", "meta.json")
    return all((one.folder / name).read_bytes() == (two.folder / name).read_bytes() for name in names)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "txt"])
def test_pieces_hold_every_document_once_in_order(kind: str, tmp_path: Path) -> None:
    texts = [f"document {i} é" + "\n" * (i % 3) for i in range(60)]
    if kind == "txt":
        for i, text in enumerate(texts):
            (tmp_path / f"{i:02d}.txt").write_text(text)
    elif kind == "parquet":
        table = pyarrow.table({"n": range(60), "text": texts})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    else:
        path = write_jsonl(tmp_path / "a.jsonl", texts)
        if kind == "jsonl.gz":
            subprocess.run(["gzip", path], check=True)
    corpus = locate(DocumentsConfig(source=str(tmp_path)))
    for size in (1, 50, 333, 10**6):
        pieces = corpus.pieces(size)
        assert [text for piece in pieces for text in corpus.read(piece)] == texts
        if kind != "jsonl.gz":
            assert len(pieces) > 1 or size > 333
    assert list(corpus.texts()) == texts


def test_a_hub_dataset_divides_into_its_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(shards: list[int]):
        for shard in shards:
            yield from ({"text": f"{shard}.{i}"} for i in range(3))

    made = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": list(range(5))})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    corpus = locate(DocumentsConfig(source="someone/books"))
    pieces = corpus.pieces(1)
    assert len(pieces) == 5
    assert list(corpus.read(pieces[3])) == ["3.0", "3.1", "3.2"]
    assert list(corpus.texts()) == [f"{shard}.{i}" for shard in range(5) for i in range(3)]


def test_lengths_are_filtered_and_what_is_kept_is_told(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["x" * n for n in range(1, 21)])
    source = locate(DocumentsConfig(source=str(tmp_path), min_tokens=4, max_document_tokens=8))
    opened = build_store(source, BYTES)
    assert sorted(map(len, read_documents(opened.whole()))) == [4, 5, 6, 7, 8]
    assert kept_line(source, opened).endswith(
        "kept 5 of 20 documents (25.0%), 35 tokens (14.3%); left out: 3 below min_tokens=4, "
        "12 above max_document_tokens=8, 0 files not UTF-8"
    )
    with pytest.raises(
        ValueError, match=r"^data\.documents\.source=[^\n]*20 documents, none of at least[^\n]*limits"
    ):
        build(tmp_path, min_tokens=30, max_document_tokens=40)


def test_duplicates_are_dropped_and_the_first_stays(tmp_path: Path) -> None:
    texts = ["One text", "two", "one  TEXT\n", "caf\u00e9", "cafe\u0301", "two", "three"]
    write_jsonl(tmp_path / "a.jsonl", texts)
    source = locate(DocumentsConfig(source=str(tmp_path), deduplicate=True))
    opened = build_store(source, BYTES)
    assert sorted(read_documents(opened.whole())) == sorted(["One text", "two", "caf\u00e9", "three"])
    assert "3 duplicates" in kept_line(source, opened)
    assert build(tmp_path).meta["documents"] == 7


@pytest.mark.parametrize(
    "options", [{}, {"max_tokens": 1500}, {"min_tokens": 12, "deduplicate": True}], ids=str
)
def test_processes_and_kills_change_nothing(
    options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [f"text {i % 150}" + "." * (i % 9) for i in range(200)])
    alone = build(tmp_path / "a.jsonl", processes=1, **options)
    monkeypatch.setattr(store, "PIECE_BYTES", 500)
    monkeypatch.setattr(store, "FORMAT", -1)  # another folder
    made, make = [], parts.PartMaker.make

    def killed(self: parts.PartMaker, number: int, *rest: object) -> parts.Part:
        if number == 3 and made.count(3) == 0:
            made.append(number)
            raise KeyboardInterrupt
        made.append(number)
        return make(self, number, *rest)

    monkeypatch.setattr(parts.PartMaker, "make", killed)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "a.jsonl", processes=1, **options)
    resumed = build(tmp_path / "a.jsonl", processes=1, **options)
    assert made[:5] == [0, 1, 2, 3, 3], "finished parts are not made again"
    assert resumed.folder != alone.folder
    meta = [json.loads((each.folder / "meta.json").read_text()) for each in (alone, resumed)]
    for name in ("documents_read", "tokens_read", "beyond", "shorter"):  # reading stops at a piece's end
        assert options.get("max_tokens") or meta[0][name] == meta[1][name]
    assert resumed.content == alone.content
    assert (resumed.folder / "tokens.arrow").read_bytes() == (alone.folder / "tokens.arrow").read_bytes()


def test_several_processes_write_the_same_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_folder: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [f"The sky is {i} times blue." for i in range(300)])
    monkeypatch.setattr(store, "PIECE_BYTES", 3000)
    tokenizer = load_tokenizer(str(tokenizer_folder))
    built = []
    for count, name in ((1, -1), (2, -2)):
        monkeypatch.setattr(store, "FORMAT", name)
        built.append(build_store(locate(DocumentsConfig(source=str(source), processes=count)), tokenizer))
    assert same_files(*built)


def test_a_killed_build_leaves_no_process_and_is_finished_by_the_next(tmp_path: Path) -> None:
    """SIGKILL of the builder: its workers end too, and its parts are used."""
    source = write_jsonl(tmp_path / "a.jsonl", [f"{i} " * 4000 for i in range(400)])
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from conf.documents import DocumentsConfig\n"
        "from data import store\n"
        "from data.sources import locate\n"
        "from data.tokenizers import ByteTokenizer\n"
        "if __name__ == '__main__':\n"
        "    store.PIECE_BYTES = 100_000\n"
        "    corpus = locate(DocumentsConfig(source=sys.argv[1], processes=2))\n"
        "    print(store.build_store(corpus, ByteTokenizer()).meta['documents'])\n"
    )
    cache = tmp_path / "cache2"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(cache)}
    command = [sys.executable, str(script), str(source)]
    process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list(cache.glob("longstate/*.partial/*.npz"))) < 3:
        time.sleep(0.01)
    process.kill()
    process.wait()
    while time.monotonic() < deadline and members(process.pid):
        time.sleep(0.05)
    assert not members(process.pid)
    assert not list(cache.glob("longstate/*/meta.json"))
    kept = {path: path.stat().st_mtime_ns for path in cache.glob("longstate/*.partial/??????.npz")}
    assert len(kept) >= 3
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout == "400\n", done.stderr
    assert not list(cache.glob("longstate/*.partial"))


def members(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


class Dying(ByteTokenizer):
    """Stands for a process that the system ends for lack of memory."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_batch(texts)


def test_a_process_that_dies_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["x" * 100] * 100)
    monkeypatch.setattr(store, "PIECE_BYTES", 2000)
    config = DocumentsConfig(source=str(source), processes=2)
    with pytest.raises(ValueError, match=r"^data\.documents\.processes=2: a process[^\n]*try fewer[^\n]*$"):
        build_store(locate(config), Dying())
    monkeypatch.setattr(parts, "_pool", lambda *_: pytest.fail("one process needs no pool"))
    assert build_store(locate(replace(config, processes=1)), Dying()).meta["documents"] == 100


LIMITED = """
import resource, sys
from conf.documents import DocumentsConfig
from data.sources import locate
from data.store import build_store, locate_store
from data.tokenizers import ByteTokenizer
from conf.load import user_errors
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with user_errors():
    build_store(locate(DocumentsConfig(source=sys.argv[1])), ByteTokenizer())
"""


def test_a_disk_that_fills_up_is_one_line(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["x" * 1000] * 300)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "full")}
    command = [sys.executable, "-c", LIMITED, str(source)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    (line,) = done.stderr.strip().split("\n")
    assert line.startswith("error: data.documents: cannot write the token cache ")
    assert "make room" in line


MEASURED = """
import sys
import torch
from conf.documents import DocumentsConfig
from data import store
from data.sources import locate
from data.tokenizers import ByteTokenizer
from lightning_modules.memory import peak_memory_mib
import datasets, pyarrow
cpu = torch.device("cpu")
before = peak_memory_mib(cpu)
corpus = locate(DocumentsConfig(source=sys.argv[1], processes=1, deduplicate=True))
meta = store.build_store(corpus, ByteTokenizer()).meta
print(meta["tokens"], peak_memory_mib(cpu) - before)
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    measured = {}
    for megabytes in (16, 96):
        with open(tmp_path / f"{megabytes}.jsonl", "w") as file:
            for i in range(megabytes * 16):
                file.write(json.dumps({"text": f"{i} " + "long text " * 6553}) + "\n")
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache2")}
        command = [sys.executable, "-c", MEASURED, str(tmp_path / f"{megabytes}.jsonl")]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        tokens, mib = done.stdout.split()
        assert int(tokens) > megabytes * 10**6
        measured[megabytes] = float(mib)
    assert measured[96] < measured[16] + 32, measured


def test_arrow_is_read_in_place_and_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.arrow.BATCH", 40)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 60000, n).astype(np.uint16) for n in rng.integers(1, 50, 100)]
    write_arrow(tmp_path / "tokens.arrow", iter(rows), np.dtype("uint16"))
    tokens = ArrowTokens(tmp_path / "tokens.arrow", "uint16")
    flat = np.concatenate(rows)
    places = rng.integers(0, len(flat), (7, 90))
    assert (tokens.take(places) == flat[places]).all()
    dataset = datasets.Dataset.from_file(str(tmp_path / "tokens.arrow"))
    assert dataset[17]["input_ids"] == rows[17].tolist()
    assert len(dataset) == 100

"""The token store: every document once, terminated, shuffled, split without leaks, built once."""

import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conf.schema import DocumentsConfig
from data import store, tokenise
from data.sources import Corpus, Piece, locate
from data.store import JoinedStreams, TokenStore, TokenStream, build_store, locate_store
from data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer

BYTES = ByteTokenizer()


def write_corpus(folder: Path, texts: list[str]) -> Corpus:
    folder.mkdir(exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:04d}.txt").write_text(text)
    return locate(DocumentsConfig(source=str(folder)))


def build(source: object, tokenizer: Tokenizer = BYTES, **options: object) -> TokenStore:
    return build_store(locate(DocumentsConfig(source=str(source), **options)), tokenizer)


def read_documents(stream: TokenStream, tokenizer: Tokenizer = BYTES) -> list[str]:
    tokens = stream.take(np.arange(len(stream)))
    parts = np.split(tokens, np.flatnonzero(tokens == stream.eos_id) + 1)
    assert len(parts.pop()) == 0, "the stream ends with an end-of-text token"
    return [tokenizer.decode(part[:-1]) for part in parts]


@pytest.mark.parametrize("kind", ["bytes", "hugging face"])
def test_every_document_once_with_its_end(kind: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    texts = [f"document {i} " * (i % 7 + 1) + "é" for i in range(100)]
    tokenizer = BYTES if kind == "bytes" else load_tokenizer(str(tokenizer_folder))
    opened = build_store(write_corpus(tmp_path / "corpus", texts), tokenizer)
    train, validation = opened.split(0.2)
    held_out, kept = read_documents(validation, tokenizer), read_documents(train, tokenizer)
    assert sorted(held_out + kept) == sorted(texts)
    assert 8 <= len(held_out) <= 35
    assert kept != sorted(kept), "shuffled"
    assert opened.meta["documents"] == 100
    assert opened.meta["tokens"] == len(train) + len(validation)
    assert opened.meta["dtype"] == ("uint8" if kind == "bytes" else "uint16")


def test_copies_fall_on_one_side(tmp_path: Path) -> None:
    texts = [f"text {i // 4}" for i in range(200)]
    train, validation = build_store(write_corpus(tmp_path / "corpus", texts), BYTES).split(0.3)
    assert not set(read_documents(train)) & set(read_documents(validation))


def test_a_larger_share_holds_out_more_of_the_same(tmp_path: Path) -> None:
    opened = build_store(write_corpus(tmp_path / "corpus", [f"text {i}" for i in range(100)]), BYTES)
    small, large = (read_documents(opened.split(share)[1]) for share in (0.1, 0.5))
    assert len(small) < len(large)
    assert set(small) < set(large)


@pytest.mark.parametrize("share", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_neither_side_is_ever_empty(tmp_path: Path, n: int, share: float) -> None:
    texts = ["x" * 99, "y" * 9, "z"][:n]
    train, validation = build_store(write_corpus(tmp_path / "corpus", texts), BYTES).split(share)
    assert min(len(train), len(validation)) >= 1
    assert len(train) + len(validation) == sum(map(len, texts)) + n


def test_one_document_is_cut(tmp_path: Path) -> None:
    train, validation = build_store(write_corpus(tmp_path / "corpus", ["0123456789" * 10]), BYTES).split(0.2)
    assert BYTES.decode(validation.take(np.arange(20))) == "0123456789" * 2
    assert read_documents(train) == ["0123456789" * 8 + ""]


def test_short_documents_are_dropped(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", ["", "a", "bb", "ccc", "dddd"])
    opened = build(tmp_path / "corpus", min_tokens=3)
    train, validation = opened.split(0.5)
    assert sorted(read_documents(train) + read_documents(validation)) == ["ccc", "dddd"]
    assert opened.meta["shorter"] == 2  # an empty file is no document
    message = (
        r"^data\.documents\.source=.*: 4 documents, none of at least data\.documents\.min_tokens=9 tokens"
    )
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "corpus", min_tokens=9)


def test_reading_stops_at_max_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "GROUP", 10)
    write_corpus(tmp_path / "corpus", ["x" * 9] * 50)
    read, taken = Corpus.read, []

    def counted(self: Corpus, piece: Piece) -> Iterator[str]:
        for text in read(self, piece):
            taken.append(text)
            yield text

    monkeypatch.setattr(Corpus, "read", counted)
    assert build(tmp_path / "corpus", max_tokens=35).meta["documents"] == 4
    assert len(taken) <= 8


@pytest.mark.parametrize("content", ["", "caf\xe9"])
def test_an_empty_corpus_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_bytes(content.encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"^data\.documents\.source=[^\n]*0 documents[^\n]*name another source$"
    ):
        build(tmp_path / "a.txt")


def test_huge_documents_are_tokenised_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["line of text é\n" * 20, "no line ends here " * 20, "short", "\n"]
    whole = build_store(write_corpus(tmp_path / "corpus", texts), BYTES)
    monkeypatch.setattr(store, "FORMAT", -1)  # another folder
    monkeypatch.setattr(tokenise, "PIECE", 32)
    monkeypatch.setattr(tokenise, "GROUP", 50)
    sizes, encode_batch = [], ByteTokenizer.encode_batch

    def recorded(self: ByteTokenizer, pieces: list[str]) -> list[np.ndarray]:
        sizes.append(sum(map(len, pieces)))
        assert max(map(len, pieces)) <= 32
        return encode_batch(self, pieces)

    monkeypatch.setattr(ByteTokenizer, "encode_batch", recorded)
    pieces = build(tmp_path / "corpus")
    assert max(sizes) < 50 + 32
    assert pieces.folder != whole.folder
    assert (pieces.folder / "tokens.arrow").read_bytes() == (whole.folder / "tokens.arrow").read_bytes()
    assert pieces.meta == whole.meta


def test_a_store_is_built_once_and_again_when_anything_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_folder: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus", ["one", "two"])
    first = build_store(corpus, BYTES)
    with monkeypatch.context() as patch:
        patch.setattr(Corpus, "read", lambda *_: pytest.fail("read again"))
        assert build(tmp_path / "corpus") == first
    others = [
        build(tmp_path / "corpus", min_tokens=2),
        build(tmp_path / "corpus", max_tokens=1000),
        build(tmp_path / "corpus", load_tokenizer(str(tokenizer_folder))),
        build_store(write_corpus(tmp_path / "corpus", ["one", "three"]), BYTES),
    ]
    assert len({first.folder, *(other.folder for other in others)}) == 5
    assert first.content == others[0].content, "the same documents make the same samples"
    assert len({first.content, others[2].content, others[3].content}) == 3


def test_concurrent_runs_build_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_corpus(tmp_path / "corpus", ["one", "two"])
    writes, write = [], store._write

    def slow_write(*arguments: object) -> None:
        writes.append(arguments)
        threading.Event().wait(0.2)
        write(*arguments)

    monkeypatch.setattr(store, "_write", slow_write)
    results: list[TokenStore] = []
    threads = [threading.Thread(target=lambda: results.append(build_store(corpus, BYTES))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(writes) == 1
    assert len(results) == 4
    assert all(result == results[0] for result in results)


def test_an_interrupted_build_leaves_nothing_to_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token_cache: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus", ["one", "two"])
    with monkeypatch.context() as patch:
        patch.setattr(store, "_publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_store(corpus, BYTES)
    assert sorted(path.suffix for path in (token_cache / "longstate").iterdir()) == [".lock", ".partial"]
    assert build_store(corpus, BYTES).meta["documents"] == 2


def test_an_unwritable_cache_is_one_line(tmp_path: Path, token_cache: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", ["one"])
    token_cache.write_text("a file, where the folder should be")
    message = r"^data\.documents: cannot write the token cache [^\n]*; make room, or set HF_DATASETS_[^\n]*$"
    with pytest.raises(ValueError, match=message):
        build_store(corpus, BYTES)


def test_streams_travel_to_workers_without_their_tokens(tmp_path: Path) -> None:
    train, _ = build_store(write_corpus(tmp_path / "corpus", ["x" * 100_000, "y" * 100_000]), BYTES).split(
        0.5
    )
    positions = np.array([[-1, 0], [len(train), 2 * len(train) + 5]])
    before = train.take(positions)
    packed = pickle.dumps(train)
    assert len(packed) < 1000
    assert (pickle.loads(packed).take(positions) == before).all()
    assert before[0, 0] == BYTES.eos_id
    assert before[0, 1] == before[1, 0], "a ring"


def test_joined_streams_read_one_after_another(tmp_path: Path) -> None:
    streams = []
    for name, letter in (("a", "x"), ("b", "y")):
        texts = [letter * n for n in range(3, 40)]
        streams.append(build_store(write_corpus(tmp_path / name, texts), BYTES).split(0.5)[1])
    joined = JoinedStreams.of(streams)
    apart = [stream.take(np.arange(len(stream))) for stream in streams]
    whole = np.concatenate([*apart, *apart])
    assert len(joined) == len(whole) // 2
    assert (joined.take(np.arange(len(whole))) == whole).all(), "a ring"
    starts, sizes = joined.documents()
    texts = [bytes(joined.take(np.arange(a, a + n + 1)).tolist()) for a, n in zip(starts, sizes, strict=True)]
    held_out = [bytes(tokens.tolist()).split(b"\0")[:-1] for tokens in apart]
    assert texts == [text + b"\0" for source in held_out for text in source]
    assert JoinedStreams.of(streams[:1]) is streams[0]


def test_the_folder_is_known_before_it_exists(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", ["one"])
    folder = locate_store(corpus, BYTES)
    assert not folder.exists()
    assert build_store(corpus, BYTES).folder == folder

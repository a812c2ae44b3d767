"""Streamed rows: a pure function of seed and index, every document once an epoch, resumed in little time."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conf.documents import DocumentsConfig
from conf.schema import DataConfig
from data import streaming
from data.opened import Documents
from data.sources import Corpus, locate
from data.streaming import StreamedDocuments
from data.tokenise import hash_text, is_held_out
from data.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()
ROWS, LENGTH = 4, 32
SEED = (3, 0, LENGTH)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """200 documents of 10 to 69 bytes in three files."""
    (tmp_path / "texts").mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("a", 60), ("b", 40), ("c", 100)):
        rows = [{"text": f"<{name}{i}" + "x" * int(rng.integers(7, 60)) + ">"} for i in range(count)]
        (tmp_path / "texts" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return locate(DocumentsConfig(source=str(tmp_path / "texts"), streaming=True))


def stream(corpus: Corpus, **options: Any) -> StreamedDocuments:
    corpus = Corpus(DocumentsConfig(**vars(corpus.config) | options), corpus.files)
    return StreamedDocuments(corpus, BYTES, ROWS * LENGTH, [LENGTH])


def rows_of(source: StreamedDocuments, indices: Any) -> torch.Tensor:
    return source.sample(LENGTH, indices, SEED)["ids"]


def test_a_row_depends_on_seed_and_index_alone(corpus: Corpus) -> None:
    whole = rows_of(stream(corpus), range(40 * ROWS))
    for indices in ([151, 2, 77], [7], list(range(30, 50))):
        assert torch.equal(rows_of(stream(corpus), indices), whole[indices])
    again = stream(corpus)
    assert torch.equal(rows_of(again, range(100, 104)), whole[100:104])
    assert torch.equal(rows_of(again, range(8, 12)), whole[8:12]), "backwards"
    other = stream(corpus).sample(LENGTH, range(8), (4, 0, LENGTH))["ids"]
    assert not torch.equal(other, whole[:8])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_read_the_rows_of_one(corpus: Corpus, ranks: int) -> None:
    whole = rows_of(stream(corpus), range(12 * ROWS))
    for rank in range(ranks):
        source, size = stream(corpus), ROWS // ranks
        for step in range(6, 12):
            first = step * ROWS + rank * size
            assert torch.equal(rows_of(source, range(first, first + size)), whole[first : first + size])


def test_lanes_go_on_and_read_training_documents_once_an_epoch(corpus: Corpus) -> None:
    source = stream(corpus, val_fraction=0.2)
    batches = [source.sample(LENGTH, range(s * ROWS, (s + 1) * ROWS), SEED) for s in range(200)]
    for before, after in itertools.pairwise(batches):
        assert torch.equal(before["targets"][:, -1], after["ids"][:, 0])
    assert batches[0]["document_starts"][:, 0].all()
    ids = torch.stack([batch["ids"] for batch in batches], 1).reshape(ROWS, -1)
    starts = torch.stack([batch["document_starts"] for batch in batches], 1).reshape(ROWS, -1)
    assert torch.equal(starts[:, 1:], ids[:, :-1] == BYTES.eos_id)
    texts = list(corpus.texts())
    wanted = [text for text in texts if not is_held_out(hash_text(text), 0.2)]
    assert 20 < len(texts) - len(wanted) < 60
    lanes = [BYTES.decode(lane).split("\0") for lane in ids]
    assert {text for lane in lanes for text in lane[:-1]} == set(wanted)
    pieces, once = len(source.pieces), set()
    for lane, found in enumerate(lanes):  # the first epoch's visits are the lanes' first ones
        visits = [source.visit(v, SEED) for v in range(lane, pieces, ROWS)]
        expected = [BYTES.decode(d[:-1]) for piece in visits for d in source.documents(piece)]
        assert found[: len(expected)] == expected
        once |= set(expected)
    assert once == set(wanted)
    orders = [[source.visit(v, SEED) for v in range(e * pieces, (e + 1) * pieces)] for e in range(2)]
    assert [sorted(order) for order in orders] == [list(range(pieces))] * 2
    assert orders[0] != orders[1]


def test_lengths_are_filtered(corpus: Corpus) -> None:
    source = stream(corpus, min_tokens=30, max_document_tokens=50)
    rows = rows_of(source, range(150 * ROWS)).view(150, ROWS, LENGTH).transpose(0, 1).flatten(1)
    found = [text for lane in rows for text in BYTES.decode(lane).split("\0")[:-1]]
    texts = {
        text for text in corpus.texts() if 30 <= len(text) <= 50 and not is_held_out(hash_text(text), 0.05)
    }
    assert set(found) == texts


def test_a_resumed_lane_passes_over_finished_pieces_unread(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, token_cache: Path
) -> None:
    source = stream(corpus)
    steps = 150
    whole = [rows_of(source, range(s * ROWS, (s + 1) * ROWS)) for s in range(steps)]
    read: list[int] = []
    documents = StreamedDocuments.documents
    monkeypatch.setattr(
        StreamedDocuments, "documents", lambda self, piece: read.append(piece) or documents(self, piece)
    )
    last = range((steps - 1) * ROWS, steps * ROWS)
    assert torch.equal(rows_of(stream(corpus), last), whole[-1])
    assert len(read) <= 2 * ROWS, "the piece that a lane stands in, and perhaps the next"
    (notes,) = (token_cache / "longstate").glob("*.counts")
    with open(notes, "a") as file:
        file.write("\n12 3")  # cut off by a full disk
    assert torch.equal(rows_of(stream(corpus), last), whole[-1])
    notes.unlink()
    read.clear()
    assert torch.equal(rows_of(stream(corpus), last), whole[-1]), "slower, as exact"
    assert len(read) >= len(source.pieces)


def test_too_few_pieces_and_documents_are_one_line(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("x" * 1000)
    with pytest.raises(
        ValueError, match=r"^data\.documents\.streaming=true: [^\n]*1 pieces, fewer than the 4 rows"
    ):
        stream(locate(DocumentsConfig(source=str(tmp_path / "one.txt"), streaming=True)))
    source = stream(corpus, min_tokens=1000)
    with pytest.raises(ValueError, match=r"^data\.documents\.source=[^\n]*min_tokens=1000 tokens; lower it "):
        rows_of(source, [0])


def test_validation_reads_held_out_documents_alone_and_no_more_than_it_needs(corpus: Corpus) -> None:
    data = DataConfig(
        name="documents", train_length=LENGTH, batch_size=ROWS, val_sequences=4, passkey=DataConfig().passkey,
        documents=DocumentsConfig(source=corpus.config.source, streaming=True, val_fraction=0.5),
        tokenizer="somewhere",  # so that no passkey prompt has to fit
    )  # fmt: skip
    documents = Documents(data, BYTES)
    lines = list(documents.prepare())
    assert "(for validation)" in lines[-1]
    held = documents.held_out()
    assert 256 <= len(held) < 256 + 71
    found = set(BYTES.decode(held.take(np.arange(len(held)))).split("\0")[:-1])
    assert found <= {text for text in corpus.texts() if is_held_out(hash_text(text), 0.5)}
    trained = BYTES.decode(documents.train().sample(LENGTH, range(0, 800, ROWS), SEED)["ids"].flatten())
    assert not found & set(trained.split("\0"))
    assert documents.validation().sample(LENGTH, range(4), (0, 1, LENGTH))["ids"].shape == (4, LENGTH)


def test_a_lane_holds_little(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "GROUP", 1)
    source = stream(corpus)
    for step in range(50):
        rows_of(source, range(step * ROWS, (step + 1) * ROWS))
        for lane in source._lanes.values():
            assert sum(map(len, lane._held)) <= 2 + 69, "the rest of a document"

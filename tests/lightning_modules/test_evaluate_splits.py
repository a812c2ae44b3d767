"""Held-out text of several sources: every split has its share of each."""

from pathlib import Path

import numpy as np

from conf.load import from_dict
from conf.schema import DataConfig
from data.opened import Documents
from data.store import JoinedStreams
from data.tokenizers import load_tokenizer
from lightning_modules.evaluation.loss import held_out_documents


def test_a_split_of_a_mixture_has_a_part_of_every_source(tmp_path: Path) -> None:
    for name, letter in (("a", "x"), ("b", "y")):
        (tmp_path / name).mkdir()
        for n in range(3, 60):
            (tmp_path / name / f"{n}.txt").write_text(letter * n)
    mixture = [{"source": str(tmp_path / "a")}, {"source": str(tmp_path / "b"), "weight": 3.0}]
    documents = {"mixture": mixture, "val_fraction": 0.5}
    data, tokenizer = (
        from_dict(DataConfig, {"name": "documents", "documents": documents}),
        load_tokenizer("bytes"),
    )
    whole = Documents(data, tokenizer).held_out()
    assert isinstance(whole, JoinedStreams)
    seen = []
    for split in ("calibration", "validation", "test"):
        stream = held_out_documents(data, tokenizer, split)
        tokens = bytes(stream.take(np.arange(len(stream))).tolist())
        assert b"x" in tokens
        assert b"y" in tokens
        seen.append(tokens)
        starts, sizes = stream.documents()
        assert len(starts) < len(tokens.strip(b"\0").split(b"\0")), "a cut document is not whole"
        for start, size in zip(starts, sizes, strict=True):
            text = tokens[start : start + size + 1]
            assert text[-1] == 0
            assert len(set(text[:-1])) == 1
    assert sum(map(len, seen)) == len(whole), "no token twice, none left out"

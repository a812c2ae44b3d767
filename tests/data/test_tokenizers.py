import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.tokenizers import ByteTokenizer, load_tokenizer


@given(st.text())
def test_bytes_decode_what_they_encode(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert ids.shape == (len(text.encode()),)
    assert tokenizer.decode(ids) == text


def test_bytes_decode_anything_a_model_may_emit() -> None:
    assert ByteTokenizer().decode([72, 105, 300, 255]) == "Hi\ufffd\ufffd"
    assert ByteTokenizer().encode("\ud800").tolist() == [63]  # half a surrogate pair, as broken JSON holds


def test_hugging_face_folder(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder))
    text = "The sky is blue: 4711 é\n"
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert len(ids) < len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.eos_id]) == "<eos>"
    assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
    assert [a.tolist() for a in tokenizer.encode_batch([text, "x"])] == [
        ids.tolist(),
        tokenizer.encode("x").tolist(),
    ]


def test_fingerprint_follows_the_content_not_the_name(tokenizer_folder: Path, tmp_path: Path) -> None:
    original = load_tokenizer(str(tokenizer_folder)).fingerprint
    copy = shutil.copytree(tokenizer_folder, tmp_path / "copy")
    assert load_tokenizer(str(copy)).fingerprint == original
    merges = json.loads((copy / "tokenizer.json").read_text())
    merges["model"]["merges"].pop()
    (copy / "tokenizer.json").write_text(json.dumps(merges))
    assert load_tokenizer(str(copy)).fingerprint != original


def test_missing_end_of_text_is_named(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tokenizer_folder, tmp_path / "no_eos")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^data\.tokenizer=.*no end-of-text token; set eos_token.*$"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("make", [lambda p: p / "missing", lambda p: p], ids=["missing", "empty"])
def test_what_does_not_load_is_one_line(make, tmp_path: Path) -> None:
    name = str(make(tmp_path))
    with pytest.raises(
        ValueError, match=r"^data\.tokenizer=[^\n]*; give bytes, a tokenizer folder[^\n]*$"
    ) as error:
        load_tokenizer(name)
    assert name in str(error.value)

"""Text comes in whole characters as soon as it is certain, and ends before stop strings."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.tokenizers import ByteTokenizer, Tokenizer
from lightning_modules.generation.text import BROKEN, LONGEST_WAIT, StopStrings, TextStream
from tests.lightning_modules.made_tokenizers import byte_fallback, byte_level

TEXT = "the end: 你好, 10 € and 🙂🙂 a b! \ud7ff ä"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    makers: dict[str, Callable[[Path], Tokenizer]] = {"level": byte_level, "fallback": byte_fallback}
    made = {name: make(tmp_path_factory.mktemp(name)) for name, make in makers.items()}
    return {"bytes": ByteTokenizer(), **made}


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.mark.parametrize("name", ["bytes", "level", "fallback"])
def test_pieces_are_the_text_in_whole_characters(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(TEXT).tolist()
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == TEXT
    assert not any(BROKEN in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 15  # as they come, not all at the end


@pytest.mark.parametrize("name", ["bytes", "level", "fallback"])
@given(text=st.text(st.characters(exclude_characters="▁ ", codec="utf-8"), max_size=12))
def test_any_text_comes_whole(tokenizers: dict[str, Tokenizer], name: str, text: str) -> None:
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(text).tolist()
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if BROKEN not in text:
        assert not any(BROKEN in piece for piece in pieces)


@pytest.mark.parametrize("name", ["bytes", "level"])
@given(data=st.data())
def test_any_tokens_give_what_decoding_them_at_once_gives(
    tokenizers: dict[str, Tokenizer], name: str, data: st.DataObject
) -> None:
    """What a model may put out: bytes that are no text."""
    tokenizer = tokenizers[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["bytes", "level", "fallback"])
def test_what_never_becomes_whole_is_told_in_the_end(tokenizers: dict[str, Tokenizer], name: str) -> None:
    """A model that puts out nothing but broken characters: little is kept, and all comes out."""
    tokenizer = tokenizers[name]
    byte = {"bytes": 0xFF, "level": tokenizer.encode("ÿ").tolist()[-1], "fallback": 2 + 0xFF}[name]
    stream, told = TextStream(tokenizer), ""
    for _ in range(500):
        told += stream.push(byte)
    assert len(stream._ids) <= LONGEST_WAIT + 1
    assert len(told) > 400
    assert told + stream.flush() == BROKEN * 500


def test_the_work_for_a_token_does_not_grow(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["level"]
    stream = TextStream(tokenizer)
    for token in tokenizer.encode(TEXT * 30).tolist():
        stream.push(token)
        assert len(stream._ids) < 16


def first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """By definition: characters come one by one until one of the stop strings is complete."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(
    text=st.text("ab.", max_size=20),
    stops=st.lists(st.text("ab.", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 20)),
)
def test_stop_strings_are_found_however_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stopper, told, found = StopStrings(stops), "", False
    for start, stop in pairwise(borders):
        if not found:
            piece, found = stopper.push(text[start:stop])
            told += piece
            assert text.startswith(told)
    if not found:
        told += stopper.flush()
    assert (told, found) == first_stop(text, stops)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stopper = StopStrings(["\n\nQ", "END"])
    assert stopper.push("yes E") == ("yes ", False)
    assert stopper.push("N") == ("", False)
    assert stopper.push("T\n") == ("ENT", False)
    assert stopper.push("\n") == ("", False)
    assert stopper.push("Q and more") == ("", True)

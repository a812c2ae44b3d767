"""The prompts of the passkey task, read back as text."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import PasskeyConfig
from data.passkey import FILLER, OPENING, PasskeyTask
from data.tokenizers import ByteTokenizer, load_tokenizer

BYTES = PasskeyTask(ByteTokenizer(), PasskeyConfig())
PROMPT = re.compile(
    r"(?P<before>.*) The passkey is (?P<key>\d+)\. Remember it\. (?P=key) is the passkey\."
    r"(?P<after>.*) What is the pass key\? The passkey is (?P=key)"
)


@pytest.fixture(params=["bytes", "hugging face"])
def task(request: pytest.FixtureRequest, tokenizer_folder: Path) -> PasskeyTask:
    name = "bytes" if request.param == "bytes" else str(tokenizer_folder)
    return PasskeyTask(load_tokenizer(name), PasskeyConfig())


@given(
    length=st.integers(BYTES.fixed_length(), 700),
    keys=st.lists(st.integers(0, 99_999), min_size=1, max_size=4),
    depth=st.floats(0, 1),
    ending=st.integers(0, 4),
)
def test_a_prompt_of_any_length_is_the_papers(
    length: int, keys: list[int], depth: float, ending: int
) -> None:
    starts = np.full(len(keys), int(depth * length))
    prompts = BYTES.prompts(length, keys, starts, np.full(len(keys), ending))
    assert prompts.ids.shape == (len(keys), length)
    for ids, key, needle in zip(prompts.ids, keys, prompts.needle_start, strict=True):
        match = PROMPT.fullmatch(BYTES.tokenizer.decode(ids))
        assert match is not None
        assert match["key"] == f"{key:05d}"
        assert needle == len(match["before"])
        filler = match["before"] + match["after"]
        assert ("".join(FILLER) * 40).find(filler) >= 0  # one run of the five sentences
        assert not filler or filler.endswith(FILLER[ending][-len(filler) :])
        if match["before"] and match["after"]:
            assert match["before"].endswith(".")  # between two sentences


def test_exact_length_with_any_tokenizer(task: PasskeyTask) -> None:
    batch = task.sample(180, range(64), (0, 0))
    key_lengths = {len(task.tokenizer.encode(f" {key:05d}")) for key in range(0, 99_999, 97)}
    assert (len(key_lengths) == 1) == (task.tokenizer.vocab_size == 256)  # the other's keys differ in tokens
    assert all(value.shape == (64, 180) for value in batch.values())
    for ids in batch["ids"]:
        assert PROMPT.fullmatch(task.tokenizer.decode(ids)) is not None


def test_batch_contract(task: PasskeyTask) -> None:
    batch = task.sample(200, range(16), (3, 0))
    ids, targets, weight, answer = (batch[k] for k in ("ids", "targets", "loss_weight", "answer"))
    assert (ids.dtype, targets.dtype, weight.dtype, answer.dtype) == (
        torch.int64,
        torch.int64,
        torch.float32,
        torch.bool,
    )
    assert "document_starts" not in batch
    assert torch.equal(targets[:, :-1], ids[:, 1:])
    assert (weight[:, -1] == 0).all()
    assert not answer[:, -1].any()
    assert (weight[answer] == 1).all()
    assert torch.equal(weight[:, :-1][~answer[:, :-1]], torch.full_like(weight[:, :-1][~answer[:, :-1]], 0.1))
    for row in range(16):
        key = PROMPT.fullmatch(task.tokenizer.decode(ids[row]))["key"]
        assert task.tokenizer.decode(targets[row][answer[row]]).strip() == key


def test_filler_weight_and_digits_follow_the_config() -> None:
    batch = PasskeyTask(ByteTokenizer(), PasskeyConfig(digits=3, filler_weight=0.0)).sample(
        160, range(8), (0, 0)
    )
    assert batch["answer"].sum(1).eq(3).all()
    assert batch["loss_weight"].sum(1).eq(3).all()


def test_a_row_depends_on_seed_and_index_alone(task: PasskeyTask) -> None:
    whole = task.sample(256, range(100, 120), (1, 0))
    for k in whole:
        part = task.sample(256, [113, 105], (1, 0))[k]
        assert torch.equal(part, whole[k][[13, 5]])
    assert not torch.equal(task.sample(256, range(100, 120), (2, 0))["ids"], whole["ids"])
    assert len({tuple(row) for row in whole["ids"].tolist()}) == 20


def test_needles_lie_where_they_are_asked_to(task: PasskeyTask) -> None:
    length, starts = 2000, np.linspace(0, 2000, 50).astype(np.int64)
    needles = task.prompts(length, np.arange(50) * 1999, starts).needle_start
    longest = max(len(task.tokenizer.encode(sentence)) for sentence in FILLER)
    reachable = starts < length - task.fixed_length() - longest
    assert reachable.sum() > 40
    assert (needles[reachable] >= starts[reachable]).all()
    assert (needles[reachable] < starts[reachable] + longest).all()
    assert (np.diff(needles[reachable]) >= 0).all()


def test_training_draws_keys_and_depths_uniformly() -> None:
    batch = BYTES.sample(512, range(2000), (0, 0))
    texts = [BYTES.tokenizer.decode(ids) for ids in batch["ids"]]
    matches = [PROMPT.fullmatch(text) for text in texts]
    keys = np.array([int(match["key"]) for match in matches])
    depths = np.array(
        [len(match["before"]) / (len(match["before"]) + len(match["after"])) for match in matches]
    )
    for values, top in ((keys, 100_000), (depths, 1)):
        counts = np.histogram(values, bins=10, range=(0, top))[0]
        assert counts.min() > 120, counts  # 200 expected
    assert {text[: -len(" What is the pass key? The passkey is 12345")][-6:] for text in texts} > {
        " blue.",
        "green.",
    }


def test_opening_comes_first_and_counts() -> None:
    task = PasskeyTask(ByteTokenizer(), PasskeyConfig(opening=True))
    assert task.fixed_length() == BYTES.fixed_length() + len(OPENING)
    text = task.tokenizer.decode(task.sample(task.fixed_length(), [0], (0, 0))["ids"][0])
    assert text.startswith(OPENING + " The passkey is")


@pytest.mark.parametrize("opening", [False, True])
@pytest.mark.parametrize("digits", [1, 5, 15])
def test_the_config_knows_the_minimum_in_bytes(digits: int, opening: bool) -> None:
    config = PasskeyConfig(digits=digits, opening=opening)
    assert config.fixed_bytes == PasskeyTask(ByteTokenizer(), config).fixed_length()


@pytest.mark.parametrize("opening", [False, True])
def test_too_short_a_length_names_the_minimum(opening: bool) -> None:
    task = PasskeyTask(ByteTokenizer(), PasskeyConfig(opening=opening))
    minimum = task.fixed_length()
    assert task.sample(minimum, [0, 1], (0, 0))["ids"].shape == (2, minimum)
    with pytest.raises(ValueError, match=rf"^data\.train_length={minimum - 1}: [^\n]*\b{minimum}\b[^\n]*$"):
        task.sample(minimum - 1, [0, 1], (0, 0))

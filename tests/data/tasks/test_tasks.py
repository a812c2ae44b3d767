"""What holds of every task: exact length, seeds, parts, chance, and prefixes that prompts share."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conf.load import from_dict
from conf.schema import DataConfig, DocumentsConfig
from conf.tasks import IN_TEXT, TASKS
from data.sources import locate
from data.store import TokenStream, build_store
from data.tasks.registry import build_source, build_task
from data.tasks.task import Draw, Task
from data.tokenizers import Tokenizer, load_tokenizer

VOCABULARY = 512  # more than either tokenizer has
SMALL = {"vocabulary": VOCABULARY, "common_times": 6, "rare_times": 2, "common": 4, "pairs": 8, "updates": 4}
Maker = Callable[..., Task]


@pytest.fixture(params=["bytes", "hugging face"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer("bytes" if request.param == "bytes" else str(tokenizer_folder))


def prose(tokenizer: Tokenizer, folder: Path) -> TokenStream:
    rng = np.random.default_rng(0)
    sentences = ["".join(rng.choice(list("abcdef ghij"), 30)).strip() + "." for _ in range(400)]
    (folder / "book.txt").write_text(" ".join(sentences))
    return build_store(locate(DocumentsConfig(source=str(folder))), tokenizer).split(0.5)[0]


@pytest.fixture
def make(tokenizer: Tokenizer, tmp_path: Path) -> Maker:
    def build(name: str, **settings: Any) -> Task:
        data = from_dict(DataConfig, {"name": name, "train_length": 2048, "tasks": SMALL | settings})
        text = prose(tokenizer, tmp_path) if name in IN_TEXT else None
        return build_task(name, data, tokenizer, text)

    return build


def draws(n: int, haystack: int | None = None, seed: int = 0) -> list[Draw]:
    return [Draw((seed, i if haystack is None else haystack, 0), (seed, i, 1)) for i in range(n)]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_prompts_of_any_exact_length(name: str, make: Maker) -> None:
    task = make(name)
    shortest = task.shortest()
    for length in (shortest, shortest + 1, shortest + 37, 2048 + shortest):
        layout = task.layout(length, draws(8))
        ids, parts = layout.ids(0, length), layout.answer(0, length)
        assert ids.shape == parts.shape == (8, length)
        assert 0 <= ids.min() <= ids.max() < VOCABULARY
        assert (parts > 0).any(1).all()
        for row, n in zip(parts, layout.parts, strict=True):
            assert set(row.tolist()) - {0} == set(range(1, n + 1))  # every part is asked for
        # Any stretch is the same stretch of the whole.
        for begin, end in ((0, 1), (length // 3, length // 2), (length - 2, length)):
            np.testing.assert_array_equal(layout.ids(begin, end), ids[:, begin:end])
            np.testing.assert_array_equal(layout.answer(begin, end), parts[:, begin:end])
        assert 0 < task.chance(length) <= 1
    with pytest.raises(ValueError, match=r"at least \d+ tokens"):
        task.layout(min(shortest // 2, shortest - 2), draws(1))


@pytest.mark.parametrize("name", TASKS)
def test_a_training_row_depends_on_seed_index_and_length_alone(name: str, make: Maker) -> None:
    task = make(name)
    length = task.shortest() + 64
    batch = task.sample(length, range(3, 9), (5, 0))
    again = make(name).sample(length, [8, 4], (5, 0))
    for key, whole in batch.items():
        assert whole.shape == (6, length)
        assert torch.equal(again[key], whole[[5, 1]])
    assert not torch.equal(task.sample(length, range(3, 9), (6, 0))["ids"], batch["ids"])
    assert len({row.numpy().tobytes() for row in batch["ids"]}) == 6
    ids, targets, weight, answer = (batch[k] for k in ("ids", "targets", "loss_weight", "answer"))
    assert torch.equal(targets[:, :-1], ids[:, 1:])
    assert (weight[answer] == 1).all()
    assert weight[~answer].max() <= 0.1
    assert (weight[:, -1] == 0).all()


@pytest.mark.parametrize("name", TASKS)
def test_prompts_of_a_group_are_equal_up_to_their_branch(name: str, make: Maker) -> None:
    task = make(name)
    length = 1024 + task.shortest()
    layout = task.layout(length, [*draws(6, haystack=0), *draws(6, haystack=1, seed=1)])
    ids, parts = layout.ids(0, length), layout.answer(0, length)
    shared = 0
    for i in range(12):
        assert layout.branch[i] <= np.flatnonzero(parts[i])[0]
        for j in range(i):
            if layout.group[i] == layout.group[j]:
                end = min(layout.branch[i], layout.branch[j])
                np.testing.assert_array_equal(ids[i, :end], ids[j, :end])
                shared += int(end > 0)
    unshared = ("mqar", "forgetting_mqar", "string_copying", "common_words", "frequent_words")
    assert (shared == 0) == (name in unshared)
    if name in ("niah_multikey_2", "niah_multikey_3", "passkey_many"):
        assert layout.branch.min() > 0.8 * length  # all but the question
        assert len(set(layout.group.tolist())) == 2


@pytest.mark.parametrize("name", TASKS)
def test_depth_is_where_it_was_asked_for(name: str, make: Maker) -> None:
    task, n = make(name), 10
    length = 4096 + task.shortest()
    asked = [Draw((0, 0), (1, i), (i / n, (i + 1) / n)) for i in range(n)]
    depth = task.layout(length, asked).depth
    if np.isnan(depth).any():
        assert np.isnan(depth).all()
        placeless = {"passkey_recent", "variable_tracking", "common_words", "frequent_words"}
        assert name in placeless | {"mqar", "forgetting_mqar", "selective_copying", "string_copying"}
    elif name != "facts":  # whose order is its own
        tolerance = 0.4 if name == "passkey_many" else 0.1  # of four keys
        np.testing.assert_allclose(depth, (np.arange(n) + 0.5) / n, atol=tolerance)


def test_text_too_short_to_train_in_is_told_before_training(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = prose(tokenizer, tmp_path)
    data = from_dict(DataConfig, {"name": "niah_essay", "train_length": len(text) + 1})
    with pytest.raises(ValueError, match=r"data\.train_length=\d+: the documents of one side"):
        build_source(data, tokenizer, text)
    build_source(replace(data, train_length=len(text)), tokenizer, text)

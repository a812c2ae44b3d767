"""Every task's answer, found again by reading its prompt as a person would."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.load import from_dict
from conf.schema import DataConfig, DocumentsConfig
from data.sources import locate
from data.store import build_store
from data.tasks.facts import Question, guess, invent, read_questions
from data.tasks.registry import build_task
from data.tasks.task import Task
from data.tokenizers import ByteTokenizer, load_tokenizer

SETTINGS = {
    "common_times": 6,
    "rare_times": 2,
    "common": 4,
    "pairs": 8,
    "updates": 4,
    "chains": 2,
    "zipf": 1.5,
}


def make(name: str, tokenizer: str = "bytes", **settings: Any) -> Task:
    data = from_dict(DataConfig, {"name": name, "train_length": 2048, "tasks": SETTINGS | settings})
    return build_task(name, data, load_tokenizer(tokenizer))


def one_number(text: str) -> list[str]:
    key = re.findall(r"secret number of ([\w-]+)\?", text)[0]
    return re.findall(rf"secret number of {key} is ([\w-]+)\. ?", text)[:1]


def recent(text: str) -> list[str]:
    return re.findall(r"The passkey is (\d+)\. Remember it\.", text)


def many(text: str) -> list[str]:
    name = re.findall(r"What is the passkey of (\w+)\?", text)[0]
    assert len(re.findall(r"passkey of \w+ is \d+\.", text)) == 4
    return re.findall(rf"passkey of {name} is (\d+)\.", text)


def overwritten(text: str) -> list[str]:
    stated = re.findall(r"passkey is now (\d+)\.", text)
    assert len(stated) == 4
    return stated[-1:]


def variables(text: str) -> list[str]:
    value = re.findall(r"Which variables are (\d+)\?", text)[0]
    holds = [value]
    for name, source in re.findall(r"Let (\w+) be (\w+)\.", text):
        if source in holds:
            holds.append(name)
    return holds[1:]


def common(text: str) -> list[str]:
    words = text.split(" The 4 most common")[0].split(" ")[1:]  # the first may be cut
    often = {word for word, _ in Counter(words).most_common(4)}
    counts = sorted(Counter(words).values(), reverse=True)
    assert counts[3] == 6 > 2 >= counts[4]
    return [word for word in dict.fromkeys(words) if word in often]


def frequent(text: str) -> list[str]:
    words = Counter(text.split(" The 3 most frequent")[0].split(" ")[1:]).most_common(4)
    assert words[0][1] > words[1][1] > words[2][1] > words[3][1]
    return [word for word, _ in words[:3]]


READERS: dict[str, Callable[[str], list[str]]] = {
    "niah_single_1": one_number,
    "niah_multikey_2": one_number,
    "niah_multikey_3": one_number,
    "passkey_recent": recent,
    "passkey_many": many,
    "passkey_overwritten": overwritten,
    "variable_tracking": variables,
    "common_words": common,
    "frequent_words": frequent,
}


@pytest.mark.parametrize("kind", ["bytes", "hugging face"])
@pytest.mark.parametrize("name", READERS)
def test_the_text_holds_its_answer(name: str, kind: str, tokenizer_folder: Path) -> None:
    task = make(name, "bytes" if kind == "bytes" else str(tokenizer_folder))
    tokenizer = task.tokenizer  # type: ignore[attr-defined]
    shortest = task.shortest()
    for length in (shortest, shortest + 301):
        batch = task.sample(length, range(12), (0, 0))
        for ids, targets, answer in zip(batch["ids"], batch["targets"], batch["answer"], strict=True):
            text, asked = tokenizer.decode(ids), tokenizer.decode(targets[answer])
            end = READERS[name](text)
            assert text.endswith(" ".join(end))
            assert re.sub(r"[\s-]", "", asked) == "".join(end).replace("-", "")


def test_recent_needles_are_recent() -> None:
    task = make("passkey_recent", recent=150)
    for ids in task.sample(3000, range(50), (0, 0))["ids"]:
        text = task.tokenizer.decode(ids)  # type: ignore[attr-defined]
        assert text.count("Remember it") == 1
        assert text.index(" The passkey is") >= 3000 - 150


@pytest.mark.parametrize("name", ["mqar", "forgetting_mqar"])
def test_recall_asks_for_the_last_value_of_every_key(name: str) -> None:
    batch = make(name).sample(200, range(20), (0, 0))
    for ids, targets, answer in zip(*(batch[k].numpy() for k in ("ids", "targets", "answer")), strict=True):
        known: dict[int, int] = {}
        rewritten = 0
        asked = np.flatnonzero(answer)
        for at in range(0, asked[0] - asked[0] % 2, 2):
            if ids[at] < 85:
                rewritten += ids[at] in known
                known[ids[at]] = ids[at + 1]
        assert rewritten == (4 if name == "forgetting_mqar" else 0)
        assert len(known) == len(asked) == 8
        assert sorted(ids[asked].tolist()) == sorted(known)
        assert all(targets[at] == known[ids[at]] for at in asked)
        assert all(85 <= value < 170 for value in known.values())


def test_copying_and_induction() -> None:
    batch = make("selective_copying").sample(100, range(10), (0, 0))
    for ids, targets, answer in zip(*(batch[k].numpy() for k in ("ids", "targets", "answer")), strict=True):
        mark = int(np.flatnonzero(ids == 17)[0])
        assert (
            targets[answer].tolist()
            == [i for i in ids[:mark].tolist() if i != 16]
            == ids[mark + 1 :].tolist()
        )
    for length in (30, 31):
        batch = make("string_copying").sample(length, range(10), (0, 0))
        for ids, answer in zip(batch["ids"].numpy(), batch["answer"].numpy(), strict=True):
            half = (length - 1) // 2
            assert ids[-half:].tolist() == ids[-2 * half - 1 : -half - 1].tolist()
            assert (ids == 16).sum() == 1 + (length % 2 == 0)
            assert answer.sum() == half
    batch = make("induction_heads").sample(500, range(10), (0, 0))
    for ids, targets, answer in zip(*(batch[k].numpy() for k in ("ids", "targets", "answer")), strict=True):
        first, last = np.flatnonzero(ids == 255)
        assert last == 498
        assert targets[answer].tolist() == [ids[first + 1]]


def where_is(thing: str, facts: list[str]) -> list[str]:
    """The places of a person or thing, in order."""
    place: dict[str, str] = {}
    holder, path = thing, []
    for fact in facts:
        who, *_, last = fact.rstrip(".").split(" ")
        if " took the " in fact:
            holder = who if last == thing else holder
        else:
            place[who] = last
            if who == holder:
                path.append(last)
    return path


@pytest.mark.parametrize("supporting", [1, 2, 3])
def test_invented_facts_tell_their_answer(supporting: int) -> None:
    rng = np.random.default_rng(0)
    answers = set()
    for _ in range(200):
        question = invent(rng, supporting)
        thing = re.findall(r"(?:is|was)(?: the)? (\w+)", question.text)[0]
        path = where_is(thing, question.facts)
        if supporting == 3:
            before = re.findall(r"before the (\w+)\?", question.text)[0]
            assert question.answer == path[path.index(before) - 1]
        else:
            assert question.answer == path[-1]
        assert len(question.supporting) == supporting
        answers.add(question.answer)
    assert len(answers) == 6


STORIES = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary?\tbathroom\t1
4 Mary went back to the garden.
5 Where is Mary?\tgarden\t4
1 Sandra took the apple.
2 Where is the apple?\tkitchen
"""


def test_stories_of_a_folder_are_hidden_between_sentences(tmp_path: Path) -> None:
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "qa1.txt").write_text(STORIES)
    questions = read_questions(str(tmp_path / "stories"))
    assert [(q.answer, q.supporting, len(q.facts)) for q in questions] == [
        ("bathroom", [0], 2),
        ("garden", [2], 3),
        ("kitchen", [], 1),
    ]
    (tmp_path / "book.txt").write_text("A sentence of a book. Another one follows! " * 400)
    tokenizer = load_tokenizer("bytes")
    stream = build_store(locate(DocumentsConfig(source=str(tmp_path / "book.txt"))), tokenizer).whole()
    settings = {"facts": str(tmp_path / "stories")}
    data = from_dict(DataConfig, {"name": "facts", "train_length": 2048, "tasks": settings})
    task = build_task("facts", data, tokenizer, stream)
    for row in task.sample(1500, range(10), (0, 0))["ids"]:
        text = tokenizer.decode(row)
        found = [q for q in questions if text.endswith(f"{q.text} Answer: {q.answer}")]
        assert any(
            re.search(".*".join(rf"(^|[.!\x00]) {re.escape(fact)}" for fact in q.facts), text, re.DOTALL)
            for q in found
        )


@pytest.mark.parametrize("line", ["Mary moved.", "1 Where is Mary?\tbathroom\t7", "1 Where?\t\t"])
def test_a_line_of_another_format_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.txt").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"^data\.tasks\.facts=.*a\.txt: line 1 [^\n]*$"):
        read_questions(str(tmp_path))


@pytest.mark.parametrize("zipf", [0.05, 0.5, 1.0, 2.0, 50.0])
def test_frequent_words_differ_in_number_at_every_length(zipf: float) -> None:
    task = make("frequent_words", zipf=zipf)
    shortest = task.shortest()
    for length in range(shortest, 5 * shortest, shortest // 9):
        batch = task.sample(length, range(2), (3,))
        for ids in batch["ids"].tolist():
            frequent(bytes(ids).decode())


def test_words_of_uneven_tokens_fit_and_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ByteTokenizer.encode

    def encode(self: ByteTokenizer, text: str) -> Any:
        return whole(self, re.sub("[b-m][aei]", "#", text))

    monkeypatch.setattr(ByteTokenizer, "encode", encode)
    for name in ("frequent_words", "common_words"):
        task = make(name, zipf=4.0)
        for length in range(task.shortest(), 3 * task.shortest(), 50):
            assert task.sample(length, range(4), (1,))["ids"].shape == (4, length)


def test_chance_of_facts_is_a_guess_among_those_named() -> None:
    asked = [Question(["Ann is in Rome.", "Bob is in Oslo."], "Where is Bob?", "Oslo", [1])]
    asked.append(Question(["Ann is in Bonn."], "Is Ann in Rome?", "no", [0]))
    assert guess([*asked, Question(["Bob is in Rome."], "Where is Bob?", "Rome", [0])]) == pytest.approx(
        (1 / 2 + 1 / 3 + 1) / 3
    )
    for supporting in (1, 2, 3):
        share = guess([invent(np.random.default_rng(i), supporting) for i in range(200)])
        assert 1 / 4 < share < 1 / 2  # of six places a story names two to four


def test_values_stated_are_what_recall_is_guessed_from() -> None:
    task = make("mqar")
    assert task.chance(512) == pytest.approx(1 / 8 + 7 / 8 / 85)


def test_settings_that_cannot_be_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"recent=3: needle, question and answer take \d+ tokens"):
        make("passkey_recent", recent=3)
    (tmp_path / "stories.txt").write_bytes(b"1 \xff\xfe")
    with pytest.raises(ValueError, match=r"stories\.txt: cannot be read"):
        read_questions(str(tmp_path))

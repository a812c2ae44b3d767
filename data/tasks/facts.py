"""Facts far apart in documents, and a question that rests on some of them, as BABILong (arXiv 2406.10149) has
it: of our own persons and places, or stories in bAbI's format from a user's folder."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator

from data.tasks.task import Draw
from data.tasks.text import SAMPLES, Haystack, Needle, Story, TextTask
from data.tokenizers import Tokenizer

PERSONS = ("Anna", "Boris", "Clara", "David")
PLACES = ("harbour", "library", "bakery", "station", "orchard", "museum")
THINGS = ("lantern", "violin", "compass")
EXTENSIONS = (".txt",)


@dataclass(frozen=True)
class Question:
    """asked after `facts`, in their order; supporting: which of them the answer rests on."""

    facts: list[str]
    text: str
    answer: str
    supporting: list[int]


class FactsTask(TextTask):
    """facts: sentences of a small world in documents; the answer is one word."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        haystack: Haystack,
        filler_weight: float | None,
        supporting: int,
        folder: str | None,
    ) -> None:
        super().__init__(tokenizer, haystack, filler_weight)
        self.supporting = supporting
        self.questions = None if folder is None else read_questions(folder)
        asked = self.questions
        if asked is None:
            asked = [invent(np.random.default_rng(i), supporting) for i in range(SAMPLES)]
        self._chance = guess(asked)

    def story(self, length: int, draw: Draw, shared: Generator, own: Generator) -> Story:
        if self.questions is None:
            asked = invent(own, self.supporting)
        else:
            asked = self.questions[own.integers(len(self.questions))]
        depths = np.sort(own.random(len(asked.facts)))
        question, answer, *facts = self.encode(
            f" {asked.text} Answer:", f" {asked.answer}", *(f" {fact}" for fact in asked.facts)
        )
        needles = [Needle(float(depth), ids) for depth, ids in zip(depths, facts, strict=True)]
        nearest = max(asked.supporting) if asked.supporting else None
        return Story(needles, question, [answer], asked=nearest)

    def chance(self, length: int) -> float:
        return self._chance

    def shortest(self) -> int:
        if self.questions is None:
            return super().shortest()
        every = (" ".join(["", *q.facts, q.text, "Answer:", q.answer]) for q in self.questions)
        # A sentence alone may take a token more than in its story.
        slack = 2 + max(len(q.facts) for q in self.questions)
        return slack + max(len(ids) for ids in self.tokenizer.encode_batch(list(every)))


def invent(rng: Generator, supporting: int) -> Question:
    """A small history in which people walk about and carry things; what is asked rests on so many facts.

    1: where is a person; 2: where is a thing that somebody took along; 3: where was it before that.
    """
    person, other = rng.permutation(PERSONS)[:2]
    thing = str(rng.choice(THINGS))
    places = [str(p) for p in rng.permutation(PLACES)]
    first, second, third = places[:3]
    elsewhere = [f"{other} went to the {place}." for place in rng.choice(places, 2, replace=False)]
    if supporting == 1:
        facts = [f"{person} went to the {first}.", f"{person} went to the {second}."]
        question = Question(facts, f"Where is {person}?", second, [1])
    elif supporting == 2:
        facts = [f"{person} took the {thing}.", f"{person} went to the {first}."]
        question = Question(facts, f"Where is the {thing}?", first, [0, 1])
    else:
        walks = [f"{person} went to the {place}." for place in (first, second, third)]
        facts = [f"{person} took the {thing}.", *walks[:2]]
        last = f"Where was the {thing} before the {second}?"
        question = Question(facts, last, first, [0, 1, 2])
    return _among(rng, question, elsewhere)


def _among(rng: Generator, question: Question, others: list[str]) -> Question:
    """The question's facts with others between them, each in its order."""
    total = len(question.facts) + len(others)
    own = np.sort(rng.permutation(total)[: len(question.facts)]).tolist()
    mine, theirs = iter(question.facts), iter(others)
    facts = [next(mine) if i in own else next(theirs) for i in range(total)]
    return Question(facts, question.text, question.answer, [own[i] for i in question.supporting])


def guess(questions: list[Question]) -> float:
    """The share of questions that are answered right by any of the answers which their facts name. Where
    they do not name the right one (yes and no, numbers), by any of all answers."""
    answers = {question.answer for question in questions}
    shares = []
    for question in questions:
        words = set(re.findall(r"\w+", " ".join(question.facts)))
        named = len(answers & words) if question.answer in words else len(answers)
        shares.append(1 / named)
    return sum(shares) / len(shares)


def read_questions(source: str) -> list[Question]:
    """Every question of the stories in a .txt file or a folder of them, in bAbI's format:

        1 Mary moved to the bathroom.
        2 John went to the hallway.
        3 Where is Mary?<tab>bathroom<tab>1

    Lines count from 1 in every story. A question rests on the lines named behind its answer.

    Raises:
        ValueError: no such file, or a line that is not in this format.
    """
    path = Path(source).expanduser()
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"data.tasks.facts={source}: no .txt file there; give a file or folder of stories")
    questions = [question for file in files for question in _read(file)]
    if not questions:
        raise ValueError(f"data.tasks.facts={source}: holds no question, a line with tabs; see --help")
    return questions


def _read(file: Path) -> Iterator[Question]:
    facts: dict[int, str] = {}
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.tasks.facts={file}: cannot be read ({error}); give text in UTF-8") from None
    for at, line in enumerate(lines, 1):
        if not line.strip():
            continue
        number, _, text = line.partition(" ")
        if not number.isdigit() or not text:
            raise ValueError(
                f"data.tasks.facts={file}: line {at} is not bAbI's: a number, a blank and a sentence"
            )
        if number == "1":
            facts = {}
        if "\t" not in text:
            facts[int(number)] = text.strip()
            continue
        question, answer, *rest = (part.strip() for part in text.split("\t"))
        order = list(facts)
        named = [int(n) for part in rest for n in part.split()]
        if not facts or not answer or not set(named) <= facts.keys():
            raise ValueError(
                f"data.tasks.facts={file}: line {at} needs an answer, and behind it numbers of lines before"
            )
        yield Question(list(facts.values()), question, answer, [order.index(n) for n in named])

"""The tasks that a model can be trained and measured on, and their settings.

Here and not in data/, so that a config can be checked against them without importing torch.
"""

from dataclasses import dataclass

from conf.fields import option, require, require_at_least

NEEDLES = (
    "passkey_many",
    "passkey_overwritten",
    "passkey_recent",
    "niah_single_1",
    "niah_multikey_2",
    "niah_multikey_3",
)
LISTS = ("variable_tracking", "common_words", "frequent_words")
SYMBOLS = (  # sequences of random tokens, without text
    "mqar",
    "forgetting_mqar",
    "selective_copying",
    "induction_heads",
    "string_copying",
)
IN_TEXT = ("niah_essay", "facts")  # hidden in documents
TASKS = (*NEEDLES, *LISTS, *SYMBOLS, *IN_TEXT)  # beside passkey, which has a section of its own

MOST_WORDS = 10**5  # different words that a prompt may hold


@dataclass(kw_only=True)
class TasksConfig:
    """Settings of the tasks other than passkey; each says whose."""

    filler_weight: float | None = option(
        None, "loss weight of tokens outside the answer; none: 0.1 in text, 0 among random tokens"
    )
    needles: int = option(4, "passkey_many: keys stated; passkey_overwritten: times the key is stated anew")
    recent: int = option(128, "passkey_recent: the last tokens of a prompt, in which the needle stands")
    chains: int = option(1, "variable_tracking: chains of variables, one of which is asked for")
    hops: int = option(4, "variable_tracking: assignments behind the first of a chain")
    common: int = option(10, "common_words: words asked for")
    common_times: int = option(30, "common_words: how often each of these occurs")
    rare_times: int = option(3, "common_words: how often any other occurs")
    frequent: int = option(3, "frequent_words: words asked for")
    zipf: float = option(2.0, "frequent_words: the k-th word occurs in proportion to k^-zipf")
    pairs: int = option(16, "mqar, forgetting_mqar: keys stated with their values; each is asked for once")
    updates: int | None = option(
        None, "forgetting_mqar: keys that are then stated again, with another value; none: half of the pairs"
    )
    copied: int = option(16, "selective_copying: tokens to be copied")
    alphabet: int = option(16, "selective_copying, string_copying: different tokens to be copied")
    vocabulary: int | None = option(
        None, "token ids of mqar, forgetting_mqar, induction_heads; none: as many as the tokenizer has"
    )
    supporting: int = option(1, "facts: sentences that an answer rests on, 1 to 3 (of our own facts)")
    facts: str | None = option(
        None, "facts: file or folder of stories in bAbI's format; none: our own, of persons and places"
    )

    def __post_init__(self) -> None:
        require_at_least("data.tasks", self, 1, "needles", "recent", "chains", "common", "frequent", "pairs")
        require_at_least("data.tasks", self, 1, "rare_times", "copied")
        require_at_least("data.tasks", self, 0, "hops")
        require_at_least("data.tasks", self, 2, "alphabet")
        if self.filler_weight is not None:
            require_at_least("data.tasks", self, 0, "filler_weight")
        if self.vocabulary is not None:
            require_at_least("data.tasks", self, 8, "vocabulary")
        more = self.common_times > self.rare_times
        remedy = f"must exceed data.tasks.rare_times={self.rare_times}"
        require(more, "data.tasks.common_times", self.common_times, remedy)
        require(self.zipf > 0, "data.tasks.zipf", self.zipf, "must be positive, e.g. 2.0")
        require(1 <= self.supporting <= 3, "data.tasks.supporting", self.supporting, "must be 1, 2 or 3")
        few = self.updates is None or 1 <= self.updates <= self.pairs
        remedy = f"must be from 1 to data.tasks.pairs={self.pairs}"
        require(few, "data.tasks.updates", self.updates, remedy)

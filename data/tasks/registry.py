"""From a config to the task that it names."""

import numpy as np

from conf.fields import require
from conf.schema import DataConfig
from conf.tasks import IN_TEXT, SYMBOLS
from data.batches import Source
from data.passkey import PasskeyTask
from data.store import Stream
from data.tasks.facts import FactsTask
from data.tasks.lists import CommonWords, FrequentWords, MultiKey
from data.tasks.needles import ManyPasskeys, OverwrittenPasskey, RecentPasskey, SingleNeedle
from data.tasks.symbols import InductionHeads, Recall, SelectiveCopying, StringCopying
from data.tasks.task import Task
from data.tasks.text import FillerHaystack, ProseHaystack
from data.tasks.tracking import VariableTracking
from data.tokenizers import Tokenizer


def build_task(name: str, data: DataConfig, tokenizer: Tokenizer, text: Stream | None = None) -> Task:
    """The task `name` of `conf.tasks.TASKS`, as `data.tasks` has it.

    text: documents in which the tasks of `IN_TEXT` hide their needles.

    Raises:
        ValueError: a setting does not fit the vocabulary, or a file of facts cannot be read.
    """
    settings = data.tasks
    weight = settings.filler_weight
    if name in SYMBOLS:
        return _symbols(name, data, tokenizer)
    if name in IN_TEXT:
        assert text is not None
        prose = ProseHaystack(tokenizer, text)
        if name == "niah_essay":
            return SingleNeedle(tokenizer, prose, weight)
        return FactsTask(tokenizer, prose, weight, settings.supporting, settings.facts)
    filler = FillerHaystack(tokenizer)
    match name:
        case "passkey_many":
            return ManyPasskeys(tokenizer, filler, weight, settings.needles)
        case "passkey_overwritten":
            return OverwrittenPasskey(tokenizer, filler, weight, settings.needles)
        case "passkey_recent":
            return RecentPasskey(tokenizer, filler, weight, settings.recent)
        case "niah_single_1":
            return SingleNeedle(tokenizer, filler, weight)
        case "niah_multikey_2" | "niah_multikey_3":
            return MultiKey(tokenizer, weight, uuids=name == "niah_multikey_3")
        case "variable_tracking":
            return VariableTracking(tokenizer, filler, weight, settings.chains, settings.hops)
        case "common_words":
            often, seldom = settings.common_times, settings.rare_times
            return CommonWords(tokenizer, weight, settings.common, often, seldom)
        case "frequent_words":
            return FrequentWords(tokenizer, weight, settings.frequent, settings.zipf)
    raise AssertionError(name)


def build_source(data: DataConfig, tokenizer: Tokenizer, text: Stream | None = None) -> Source:
    """Samples of the task `data.name`, which is not documents. Raises ValueError as `build_task`, and where
    data.train_length or data.curriculum_length is too short for a prompt."""
    if data.name == "passkey":
        passkey = PasskeyTask(tokenizer, data.passkey)
        # Keys may differ in tokens: the longest of many stands for all.
        keys = np.random.default_rng(0).integers(passkey.n_keys, size=256)
        data.require_passkey_fits(max(passkey.fixed_length(int(key)) for key in keys))
        return passkey
    if text is not None:
        remedy = f"the documents of one side, training or validation, have only {len(text):,} tokens to hide "
        remedy += "needles in; give more text, another data.documents.val_fraction or shorter prompts"
        require(data.train_length <= len(text), "data.train_length", data.train_length, remedy)
    task = build_task(data.name, data, tokenizer, text)
    shortest = task.shortest()
    for name in ("train_length", "curriculum_length"):
        length = getattr(data, name)
        remedy = f"a prompt of {data.name} needs at least {shortest} tokens; give it a longer length"
        require(length is None or length >= shortest, f"data.{name}", length, remedy)
    return task


def _symbols(name: str, data: DataConfig, tokenizer: Tokenizer) -> Task:
    settings = data.tasks
    weight, vocabulary = settings.filler_weight, settings.vocabulary or tokenizer.vocab_size
    match name:
        case "mqar":
            return Recall(weight, vocabulary, settings.pairs, 0)
        case "forgetting_mqar":
            updates = -(-settings.pairs // 2) if settings.updates is None else settings.updates
            return Recall(weight, vocabulary, settings.pairs, updates)
        case "selective_copying":
            return SelectiveCopying(weight, vocabulary, settings.alphabet, settings.copied)
        case "string_copying":
            return StringCopying(weight, vocabulary, settings.alphabet)
        case "induction_heads":
            return InductionHeads(weight, vocabulary)
    raise AssertionError(name)

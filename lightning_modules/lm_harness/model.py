"""The model that lm-evaluation-harness asks: nothing is truncated, every score has its length beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from numpy.typing import NDArray

from data.batches import batched
from data.tokenizers import Tokenizer
from lightning_modules.lm_harness.reading import BatchReader

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Length:
    """tokens that the model read for one request, its answer included."""

    task: str
    doc_id: int
    request: str
    tokens: int


class LongstateLM(LM):
    """max_length: longer requests raise ValueError; None: any length is read."""

    def __init__(
        self, reader: BatchReader, tokenizer: Tokenizer, max_length: int | None, max_new_tokens: int
    ) -> None:
        super().__init__()
        self.reader, self.tokenizer = reader, tokenizer
        self.max_length, self.max_new_tokens = max_length, max_new_tokens
        self.lengths: list[Length] = []

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        pairs = [self._encode_pair(*request.args) for request in requests]
        self._note(requests, [len(context) + len(text) for context, text in pairs])
        found = [(score.log_p, score.greedy) for score in self.reader.likelihoods(pairs)]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Every text whole, behind an end-of-text token: no windows, since the state goes on."""
        texts = [self.tokenizer.encode(request.args[0]) for request in requests]
        self._note(requests, [1 + len(text) for text in texts])
        filled = [i for i, text in enumerate(texts) if len(text)]
        scores = self.reader.likelihoods([(self._beginning(), texts[i]) for i in filled])
        found = [0.0] * len(requests)
        for i, score in zip(filled, scores, strict=True):
            found[i] = score.log_p
            self.cache_hook.add_partial("loglikelihood_rolling", requests[i].args, score.log_p)
        return found

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Continuations up to the first of a task's stop strings; requests of equal settings side by side."""
        contexts = [self._encode_context(request.args[0]) for request in requests]
        plans = [self._decoding(request.args[1]) for request in requests]
        most = [plan["max_new_tokens"] for plan in plans]
        self._check(requests, [len(c) + n for c, n in zip(contexts, most, strict=True)])
        order = sorted(range(len(requests)), key=lambda i: (str(plans[i]), len(contexts[i])))
        found, read = [""] * len(requests), [0] * len(requests)
        for _, alike in groupby(order, key=lambda i: str(plans[i])):
            for batch in batched(alike, self.reader.rows):
                prompts = [contexts[i] for i in batch]
                done = self.reader.model.generate(
                    prompts,
                    tokenizer=self.tokenizer,
                    mitigation=self.reader.rule(max(map(len, prompts)) + most[batch[0]]),
                    segment_length=self.reader.segment,
                    **plans[batch[0]],
                )
                for i, row in zip(batch, done.rows, strict=True):
                    found[i], read[i] = row.text, len(contexts[i]) + len(row.tokens)
                    self.cache_hook.add_partial("generate_until", requests[i].args, row.text)
        self._note(requests, read)
        return found

    def _encode_pair(self, context: str, continuation: str) -> tuple[Ints, Ints]:
        """Tokens of both, cut where the context's own end; blanks between belong to the continuation.

        Of an empty continuation none, which is certain; of any other at least one.
        """
        if not continuation:
            return self._encode_context(context), np.empty(0, np.int64)
        blanks = len(context) - len(context.rstrip())
        if blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        if not context:
            return self._beginning(), self.tokenizer.encode(continuation)
        whole, own = self.tokenizer.encode_batch([context + continuation, context])
        cut = min(len(own), len(whole) - 1)
        return whole[:cut] if cut else self._beginning(), whole[cut:]

    def _encode_context(self, context: str) -> Ints:
        ids = self.tokenizer.encode(context)
        return ids if len(ids) else self._beginning()

    def _beginning(self) -> Ints:
        return np.array([self.tokenizer.eos_id])

    def _decoding(self, settings: dict[str, Any]) -> dict[str, Any]:
        """A task's generation_kwargs as `conf.generate_schema.DecodingConfig` has them; greedy unless it says
        do_sample."""
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        names = ("max_gen_toks", "max_new_tokens", "max_tokens")
        most = next((settings[name] for name in names if settings.get(name)), self.max_new_tokens)
        plan: dict[str, Any] = {"max_new_tokens": int(most), "stop": [stop for stop in stops if stop]}
        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            plan["temperature"] = float(settings.get("temperature", 1.0))
            plan |= {name: settings[name] for name in ("top_k", "top_p", "min_p") if settings.get(name)}
        return plan

    def _check(self, requests: Sequence[Instance], tokens: Sequence[int]) -> None:
        """Raises ValueError for a request above `max_length`."""
        for request, n in zip(requests, tokens, strict=True):
            if self.max_length is not None and n > self.max_length:
                raise ValueError(
                    f"max_length={self.max_length}: document {request.doc_id} of task {request.task_name} "
                    f"needs {n} tokens, and nothing is truncated here; raise it, or leave it out to read any "
                    "length"
                )

    def _note(self, requests: Sequence[Instance], tokens: Sequence[int]) -> None:
        self._check(requests, tokens)
        for request, n in zip(requests, tokens, strict=True):
            task, doc = request.task_name or "", request.doc_id or 0
            self.lengths.append(Length(task, doc, request.request_type, n))

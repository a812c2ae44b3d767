"""The model that lm-evaluation-harness asks: nothing is truncated, every score has its length beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from numpy.typing import NDArray

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
        """Greedy continuations, up to the first of the task's stop strings."""
        contexts = [self._encode_context(request.args[0]) for request in requests]
        plans = [self._plan(request.args[1]) for request in requests]
        self._check(requests, [len(c) + most for c, (most, _) in zip(contexts, plans, strict=True)])
        read = [0] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (plans[i][0], len(contexts[i])))
        found = [""] * len(requests)
        for start in range(0, len(order), self.reader.rows):
            batch = order[start : start + self.reader.rows]
            stops = [plans[i][1] for i in batch]

            def done(row: int, written: list[int], stops: list[list[str]] = stops) -> bool:
                if written[-1] == self.tokenizer.eos_id:
                    return True
                text = self.tokenizer.decode(written)
                return any(stop in text for stop in stops[row])

            most = max(plans[i][0] for i in batch)
            rows = self.reader.continue_greedily([contexts[i] for i in batch], most, done)
            for i, written in zip(batch, rows, strict=True):
                written = written[: plans[i][0]]
                read[i] = len(contexts[i]) + len(written)
                found[i] = self._finish(written, plans[i][1])
                self.cache_hook.add_partial("generate_until", requests[i].args, found[i])
        self._note(requests, read)
        return found

    def _encode_pair(self, context: str, continuation: str) -> tuple[Ints, Ints]:
        """Tokens of both, cut where the context's own end; blanks between belong to the continuation."""
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

    def _plan(self, settings: dict[str, Any]) -> tuple[int, list[str]]:
        """(most tokens, stop strings). Raises ValueError for what is not greedy."""
        sampled = settings.get("do_sample", False) and settings.get("temperature", 1.0) > 0
        if sampled:
            raise ValueError(
                f"tasks: a task samples its answers ({settings}), this model answers greedily: set "
                "do_sample: false in its generation_kwargs"
            )
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        names = ("max_gen_toks", "max_new_tokens", "max_tokens")
        most = next((settings[name] for name in names if settings.get(name)), self.max_new_tokens)
        return int(most), [stop for stop in stops if stop]

    def _finish(self, written: list[int], stops: Sequence[str]) -> str:
        if self.tokenizer.eos_id in written:
            written = written[: written.index(self.tokenizer.eos_id)]
        text = self.tokenizer.decode(written)
        for stop in stops:
            text = text.split(stop)[0]
        return text

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

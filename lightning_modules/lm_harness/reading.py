"""Log-likelihoods of many continuations of many contexts, of any lengths, without truncation.

Contexts of a batch are read side by side without padding (`lightning_modules.generation.prefill`).
Continuations are padded on the right, behind all that counts. Both are read in segments that carry the state:
memory is flat in length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_modules.backbone import Mamba2LM
from lightning_modules.evaluation.streaming import Reader
from lightning_modules.generation.prefill import read_prompts
from lightning_modules.mitigations import AnyMitigation

Ints = NDArray[np.int64]
HEAD = 512  # tokens whose logits exist together


@dataclass(frozen=True)
class Likelihood:
    """Sum of log p of a continuation's tokens, and whether each is the likeliest."""

    log_p: float
    greedy: bool


class BatchReader:
    """rule: the mitigation for so many tokens. segment: tokens of a forward pass, over all rows."""

    def __init__(
        self, model: Mamba2LM, rule: Callable[[int], AnyMitigation], segment: int, rows: int
    ) -> None:
        self.model, self.rule, self.segment, self.rows = model, rule, segment, rows
        self.tokens = 0

    @torch.inference_mode()
    def likelihoods(self, requests: Sequence[tuple[Ints, Ints]]) -> list[Likelihood]:
        """Of (context, continuation) pairs, contexts of one token or more. A context that several requests
        share is read once. An empty continuation is certain: nothing is read for it."""

        def size(i: int) -> int:
            return len(requests[i][0]) + len(requests[i][1])

        found = {i: Likelihood(0.0, True) for i, (_, text) in enumerate(requests) if not len(text)}
        by_context: dict[bytes, list[int]] = {}
        for i, (context, text) in enumerate(requests):
            if len(text):
                by_context.setdefault(context.tobytes(), []).append(i)
        # Of like lengths together, at most so many rows.
        groups = [part for group in by_context.values() for part in _cut(sorted(group, key=size), self.rows)]
        groups.sort(key=lambda group: size(group[-1]))
        for batch in _batched(groups, self.rows):
            members = [i for group in batch for i in group]
            reader = Reader(self.model, self.rule(max(map(size, members))), self.segment, self._count)
            state, hidden = read_prompts(reader, [requests[group[0]][0] for group in batch])
            of = torch.tensor([row for row, group in enumerate(batch) for _ in group], device=hidden.device)
            rest = _Continuations([requests[i][1] for i in members])
            scores = _Scores(self.model, rest)
            scores.add(hidden[of][:, None], 0)
            for low, part in reader.stream(rest.ids, state.rows(of), 0, rest.width - 1):
                scores.add(part, low + 1)
            found |= dict(zip(members, scores.likelihoods(), strict=True))
        return [found[i] for i in range(len(requests))]

    def _count(self, tokens: int) -> None:
        self.tokens += tokens


class _Continuations:
    """Rows padded on the right."""

    def __init__(self, texts: Sequence[Ints]) -> None:
        self.width = max(map(len, texts))
        self._ids = np.zeros((len(texts), self.width), np.int64)
        self.counts = np.zeros((len(texts), self.width), bool)
        for row, text in enumerate(texts):
            self._ids[row, : len(text)], self.counts[row, : len(text)] = text, True

    def ids(self, begin: int, end: int) -> Ints:
        return self._ids[:, begin:end]


class _Scores:
    """Adds up what hidden states say of the tokens that follow them."""

    def __init__(self, model: Mamba2LM, rest: _Continuations) -> None:
        self.model, self.rest = model, rest
        self.log_p, self.greedy = np.zeros(len(rest.counts)), np.ones(len(rest.counts), bool)

    def add(self, hidden: Tensor, first: int) -> None:
        """hidden (n, w, d_model): before the tokens from `first` on."""
        end = first + hidden.shape[1]
        row, column = np.nonzero(self.rest.counts[:, first:end])
        targets = torch.from_numpy(self.rest.ids(first, end)[row, column]).to(hidden.device)
        chosen = hidden[row, column]
        for start in range(0, len(targets), HEAD):
            part = slice(start, start + HEAD)
            logits, target = self.model.lm_head(chosen[part]), targets[part]
            log_p = logits.double().log_softmax(-1).gather(1, target[:, None])[:, 0]
            np.add.at(self.log_p, row[part], log_p.cpu().numpy())
            missed = (logits.argmax(-1) != target).cpu().numpy()
            self.greedy[row[part][missed]] = False

    def likelihoods(self) -> list[Likelihood]:
        return [Likelihood(float(a), bool(b)) for a, b in zip(self.log_p, self.greedy, strict=True)]


def _cut(group: list[int], rows: int) -> list[list[int]]:
    return [group[start : start + rows] for start in range(0, len(group), rows)]


def _batched(groups: Sequence[list[int]], rows: int) -> list[list[list[int]]]:
    """Groups in their order, some at a time: at most `rows` requests together."""
    batches: list[list[list[int]]] = []
    size = rows
    for group in groups:
        if size + len(group) > rows:
            batches.append([])
            size = 0
        batches[-1].append(group)
        size += len(group)
    return batches

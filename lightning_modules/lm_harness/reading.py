"""Log-likelihoods and greedy continuations of many token sequences of different lengths, without truncation.

Contexts are padded on the left and begin, for the model, with their first token: its state is reset there, so
padding never enters it. Continuations are padded on the right, behind all that counts. Both are read in
segments that carry the state: memory is flat in length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_modules.backbone import Mamba2LM
from lightning_modules.mitigations import AnyMitigation
from lightning_modules.state import ModelState

Ints = NDArray[np.int64]
HEAD = 512  # tokens whose logits exist together


@dataclass(frozen=True)
class Likelihood:
    """Sum of log p of a continuation's tokens, and whether each is the likeliest."""

    log_p: float
    greedy: bool


class BatchReader:
    """segment: tokens of a forward pass, over all rows."""

    def __init__(
        self, model: Mamba2LM, rule: Callable[[int], AnyMitigation], segment: int, rows: int
    ) -> None:
        self.model, self.rule, self.segment, self.rows = model, rule, segment, rows
        self.device = model.lm_head.weight.device
        self.tokens = 0

    @torch.inference_mode()
    def likelihoods(self, requests: Sequence[tuple[Ints, Ints]]) -> list[Likelihood]:
        """Of (context, continuation) pairs, contexts of one token or more. A context that several requests
        share is read once."""
        by_context: dict[bytes, list[int]] = {}
        for i, (context, _) in enumerate(requests):
            by_context.setdefault(context.tobytes(), []).append(i)

        def size(i: int) -> int:
            return len(requests[i][0]) + len(requests[i][1])

        # Of like lengths together, at most so many rows.
        groups = [part for group in by_context.values() for part in _cut(sorted(group, key=size), self.rows)]
        groups.sort(key=lambda group: size(group[-1]))
        found: dict[int, Likelihood] = {}
        for batch in _batched(groups, self.rows):
            members = [i for group in batch for i in group]
            mitigation = self.rule(max(map(size, members)))
            # The last token of a context predicts the first of its continuation: it is read with that.
            state = self._prefill([requests[group[0]][0][:-1] for group in batch], mitigation)
            of = torch.tensor([row for row, group in enumerate(batch) for _ in group], device=self.device)
            own = None if state is None else state.rows(of)
            pairs = [requests[i] for i in members]
            texts = [np.append(context[-1:], continuation) for context, continuation in pairs]
            found |= dict(zip(members, self._score(texts, own, mitigation), strict=True))
        return [found[i] for i in range(len(requests))]

    @torch.inference_mode()
    def continue_greedily(
        self, contexts: Sequence[Ints], most: int, done: Callable[[int, list[int]], bool]
    ) -> list[list[int]]:
        """The likeliest tokens behind each context, until `done(row, tokens)` or `most` of them."""
        mitigation = self.rule(max(map(len, contexts)) + most)
        state = self._prefill([context[:-1] for context in contexts], mitigation)
        last = torch.tensor([[int(context[-1])] for context in contexts], device=self.device)
        written: list[list[int]] = [[] for _ in contexts]
        open_rows = set(range(len(contexts)))
        for _ in range(most):
            hidden, state = self.model.hidden(last, state, mitigation=mitigation)
            last = self.model.lm_head(hidden).argmax(-1)
            for row in sorted(open_rows):
                written[row].append(int(last[row, 0]))
                if done(row, written[row]):
                    open_rows.discard(row)
            if not open_rows:
                break
        return written

    def _prefill(self, contexts: Sequence[Ints], mitigation: AnyMitigation) -> ModelState | None:
        """The state behind each context; None where all are empty."""
        width = max(map(len, contexts))
        if width == 0:
            return None
        ids = np.zeros((len(contexts), width + 1), np.int64)
        starts = np.zeros((len(contexts), width + 1), bool)
        for row, context in enumerate(contexts):
            ids[row, width - len(context) : width] = context
            starts[row, width - len(context)] = True
        state: ModelState | None = None
        for low, high in self._spans(len(contexts), width):
            first = torch.from_numpy(starts[:, low:high]).to(self.device)
            part = torch.from_numpy(ids[:, low:high]).to(self.device)
            _, state = self.model.hidden(part, state, document_starts=first, mitigation=mitigation)
            self.tokens += part.numel()
        assert state is not None
        # An empty context beside longer ones is nothing but padding: its row begins anew.
        empty = torch.from_numpy(starts[:, width]).to(self.device)
        return state.zero_rows(empty) if bool(empty.any()) else state

    def _score(
        self, texts: Sequence[Ints], state: ModelState | None, mitigation: AnyMitigation
    ) -> list[Likelihood]:
        """Of the tokens of each text behind its first."""
        width = max(map(len, texts)) - 1
        ids, counts = np.zeros((len(texts), width + 1), np.int64), np.zeros((len(texts), width), bool)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text
            counts[row, : len(text) - 1] = True
        log_p, greedy = np.zeros(len(texts)), np.ones(len(texts), bool)
        for low, high in self._spans(len(texts), width):
            part = torch.from_numpy(ids[:, low:high]).to(self.device)
            hidden, state = self.model.hidden(part, state, mitigation=mitigation)
            self.tokens += part.numel()
            at, column = np.nonzero(counts[:, low:high])
            targets = torch.from_numpy(ids[:, low + 1 : high + 1][at, column]).to(self.device)
            values, hits = self._read_out(hidden[at, column], targets)
            np.add.at(log_p, at, values)
            greedy[at[~hits]] = False
        return [Likelihood(float(a), bool(b)) for a, b in zip(log_p, greedy, strict=True)]

    def _read_out(self, hidden: Tensor, targets: Tensor) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """log p of each target, and whether it is the likeliest."""
        values, hits = [], []
        for start in range(0, len(targets), HEAD):
            logits, target = self.model.lm_head(hidden[start : start + HEAD]), targets[start : start + HEAD]
            values.append(logits.double().log_softmax(-1).gather(1, target[:, None])[:, 0].cpu())
            hits.append((logits.argmax(-1) == target).cpu())
        return torch.cat(values).numpy(), torch.cat(hits).numpy()

    def _spans(self, rows: int, width: int) -> list[tuple[int, int]]:
        step = max(1, self.segment // rows)
        return [(low, min(low + step, width)) for low in range(0, width, step)]


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


def _cut(group: list[int], rows: int) -> list[list[int]]:
    return [group[start : start + rows] for start in range(0, len(group), rows)]

"""Asks prompts for their answers, reading once what prompts have in common.

Prompts of a group differ only from their branches on: needles, or questions. So `score` reads the text of a
group once, side by side with other groups, and branches off the rows whose needle comes next: a row costs the
tokens behind its branch, not its length. Of ten needles at ten depths of one text that is 0.95 texts and half
a text a needle, 6 in place of 10; of ten recent needles, or of ten questions about one text, little above 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.layout import Layout
from lightning_modules.evaluation.streaming import AnyState, Reader

# Rows that leave the shared prefix together, which makes the passes behind the branch wider: those whose
# branches lie within NEAR tokens, or this share of the prompt, and so re-read at most that much.
BRANCH = 8
NEAR = 512
NEAR_SHARE = 1 / 64
HEAD = 512  # tokens whose logits exist together


@dataclass(frozen=True)
class Score:
    """Of n prompts, each (n,): the share of the answer's tokens that are right, and of its parts; whether all
    are; whether the outputs were free of NaN and infinity; mean -log p of the answer's tokens, in nats.

    A prompt with a non-finite output has answered nothing: shares 0, exact False, loss infinite.
    """

    tokens: NDArray[np.float64]
    parts: NDArray[np.float64]
    exact: NDArray[np.bool_]
    finite: NDArray[np.bool_]
    loss: NDArray[np.float64]

    def select(self, rows: NDArray[np.bool_]) -> "Score":
        """The scores of some prompts."""
        return Score(*(values[rows] for values in vars(self).values()))


def score(reader: Reader, layout: Layout) -> Score:
    """Ask every prompt.

    The answer is read with teacher forcing: each token is the argmax given the right tokens before it. A
    prompt is exact when all are right, which is just when greedy decoding, given the tokens between that are
    not asked for (a byte tokenizer's blank before a word), writes the whole answer.
    """
    n = len(layout)
    scores = Score(np.zeros(n), np.zeros(n), np.zeros(n, bool), np.zeros(n, bool), np.zeros(n))
    branches, shared_rows, shared_row = _plan(layout)
    shared = layout.rows(shared_rows)
    state: AnyState | None = None
    position = 0
    for branch, block in _blocks(layout, branches):
        if branch > 0:
            state, _ = reader.read(shared.ids, state, position, branch)
            position = branch
        own = None if state is None else state.rows(torch.from_numpy(shared_row[block]).to(reader.device))
        for values, part in zip(
            vars(scores).values(), _ask(reader, layout.rows(block), own, branch), strict=True
        ):
            values[block] = part
    return scores


def tokens_to_read(layout: Layout) -> int:
    """What `score` will read, in tokens."""
    branches, shared_rows, _ = _plan(layout)
    blocks = list(_blocks(layout, branches))
    suffixes = sum(len(block) * (layout.length - 1 - branch) for branch, block in blocks)
    return len(shared_rows) * blocks[-1][0] + suffixes


def accuracy(scores: Score, names: tuple[str, ...] = ("accuracy", "exact")) -> dict[str, Any]:
    """Shares of some prompts with Wilson 95% intervals, as a row of evaluation.json.

    names: of accuracy (parts of the answer), exact, digits (its tokens). Parts of one prompt stand or fall
    together, so every interval counts prompts, not parts.
    """
    n = len(scores.exact)
    row: dict[str, Any] = {"prompts": n}
    shares = {"accuracy": scores.parts, "exact": scores.exact, "digits": scores.tokens}
    for name in names:
        share = float(shares[name].mean())
        low, high = wilson_interval(share, n)
        row |= {name: share, f"{name}_low": low, f"{name}_high": high}
    finite = bool(scores.finite.all())
    return row | {"answer_loss": float(scores.loss.mean()) if finite else None, "non_finite": not finite}


def wilson_interval(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion `share` seen in n trials."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def _plan(layout: Layout) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Every row's branch, 0 where it has its text alone; of each text of several rows the row with the
    furthest branch; which of these a row's text is."""
    _, group, size = np.unique(layout.group, return_inverse=True, return_counts=True)
    branches = np.where(size[group] > 1, layout.branch, 0)
    far_first = np.argsort(-branches, kind="stable")
    texts = [int(i) for i in np.flatnonzero(size > 1)]
    rows = [int(far_first[group[far_first] == i][0]) for i in texts]
    number = np.zeros(len(size), np.int64)
    number[texts] = np.arange(len(texts))
    return branches, np.array(rows, np.int64), number[group]


def _blocks(layout: Layout, branches: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Rows in the order of their branches, some at a time, and the position up to which a block shares."""
    order = np.argsort(branches, kind="stable")
    near = max(NEAR, int(layout.length * NEAR_SHARE))
    start = 0
    while start < len(order):
        first = int(branches[order[start]])
        last = first + near if first > 0 else 0  # rows with a text of their own stay among themselves
        stop = start + int(np.searchsorted(branches[order[start : start + BRANCH]], last, "right"))
        yield first, order[start:stop]
        start = stop


@torch.inference_mode()
def _ask(
    reader: Reader, rows: Layout, state: AnyState | None, begin: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Read from `begin` to the end; the fields of `Score`."""
    n, parts = len(rows), rows.parts
    asked, right, loss = np.zeros(n), np.zeros(n), np.zeros(n)
    wrong, finite = np.zeros((n, int(parts.max()) + 1), bool), np.ones(n, bool)
    for first, hidden in reader.stream(rows.ids, state, begin, rows.length - 1):
        end = first + hidden.shape[1]
        part = rows.answer(first + 1, end + 1)
        row, column = np.nonzero(part)
        if len(row) == 0:
            continue
        targets = rows.ids(first + 1, end + 1)[row, column]
        hits, surprise, fine = _read_out(reader, hidden[row, column], targets)
        np.add.at(asked, row, 1)
        np.add.at(right, row, hits)
        np.add.at(loss, row, surprise)
        wrong[row[~hits], part[row, column][~hits]] = True
        finite[row[~fine]] = False
    failed = wrong.sum(1)
    tokens, share = right / asked * finite, (parts - failed) / parts * finite
    return tokens, share, (failed == 0) & finite, finite, np.where(finite, loss / asked, np.inf)


def _read_out(
    reader: Reader, hidden: torch.Tensor, targets: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.bool_]]:
    """Of hidden states (k, d_model) and what follows them: hit, -log p, finite, each (k,)."""
    hits, surprise, fine = [], [], []
    for start in range(0, len(targets), HEAD):
        logits = reader.model.lm_head(hidden[start : start + HEAD])
        target = torch.from_numpy(targets[start : start + HEAD]).to(logits.device)
        hits.append((logits.argmax(-1) == target).cpu())
        surprise.append(-logits.double().log_softmax(-1).gather(1, target[:, None])[:, 0].cpu())
        fine.append(logits.isfinite().all(1).cpu())
    return torch.cat(hits).numpy(), torch.cat(surprise).numpy(), torch.cat(fine).numpy()

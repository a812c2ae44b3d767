"""Passkey accuracy with recent needles and over all depths, sharing what the prompts have in common.

Prompts of one length differ only from their needles on, up to the few phases at which the filler may begin.
So `score` reads the filler once per phase, side by side, and branches off the rows whose needle comes next: a
row costs the tokens behind its needle, not its length. For 64 recent prompts of 64 x 256 tokens that is 0.09M
tokens in place of 1.05M; 80 prompts over all depths cost a little more than half.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.passkey import FILLER, Layout, PasskeyTask
from lightning_modules.evaluation.streaming import AnyState, Reader

# First word of every generator's seed: no training stream begins with it.
STREAM = 0x7E57
RECENT, RECALL = 0, 1
# Rows that leave the shared prefix together. Fewer share more; more make the passes behind the branch wider.
BRANCH = 8


@dataclass(frozen=True)
class Score:
    """Of n prompts, each (n,): the share of the answer's digit tokens that are right; whether all are;
    whether the outputs were free of NaN and infinity; mean -log p of the digit tokens, in nats.

    A prompt with a non-finite output has answered nothing: digits 0, exact False, loss infinite.
    """

    digits: NDArray[np.float64]
    exact: NDArray[np.bool_]
    finite: NDArray[np.bool_]
    loss: NDArray[np.float64]


def recent_prompts(task: PasskeyTask, length: int, window: int, n: int, seed: int) -> Layout:
    """Prompts whose last `window` tokens are laid out as a training prompt of `window` tokens is.

    The needle starts uniformly over what fits into the window, as in training, and the question ends it.
    Keys, distances and endings depend on the seed alone: every length asks the same questions over the same
    last tokens, so that lengths differ only in how much came before.
    """
    draws = np.random.default_rng([STREAM, seed, RECENT]).random((3, n))
    return _lay(task, length, window, draws)


def recall_prompts(
    task: PasskeyTask, length: int, depths: int, per_depth: int, seed: int
) -> tuple[Layout, NDArray[np.float64]]:
    """Prompts with the needle anywhere, and the depth of each (n,).

    The range of a training needle, scaled to `length`, is cut into `depths` equal bins; a needle starts
    uniformly within its bin, whose middle is its depth in (0, 1). All bins together are the training
    distribution.
    """
    draws = np.random.default_rng([STREAM, seed, RECALL]).random((3, depths * per_depth))
    bins = np.repeat(np.arange(depths), per_depth)
    draws[1] = (bins + draws[1]) / depths
    return _lay(task, length, length, draws), (bins + 0.5) / depths


def shortest_prompt(task: PasskeyTask, prompts: int, seed: int) -> int:
    """Tokens of the longest prompt without filler among the keys that `seed` draws."""
    draws = [np.random.default_rng([STREAM, seed, kind]).random((3, prompts))[0] for kind in (RECENT, RECALL)]
    return max(task.fixed_length(int(key)) for key in np.concatenate(draws) * task.n_keys)


def score(reader: Reader, layout: Layout) -> Score:
    """Ask every prompt for its key.

    The answer is read with teacher forcing: each digit token is the argmax given the right tokens before it.
    A prompt is exact when all are right, which is just when greedy decoding, started behind the answer's
    tokens without a digit (a byte tokenizer's leading space), writes the whole key.
    """
    n = len(layout)
    digits, exact, finite, loss = np.zeros(n), np.zeros(n, bool), np.zeros(n, bool), np.zeros(n)
    phase_rows, phase = _phase_rows(layout)
    shared = layout.rows(phase_rows)
    state: AnyState | None = None
    position = 0
    for branch, block in _blocks(layout):
        state, _ = reader.read(shared.ids, state, position, branch)
        position = branch
        own = None if state is None else state.rows(torch.from_numpy(phase[block]).to(reader.device))
        answer = _answer(reader, layout.rows(block), own, branch)
        digits[block], exact[block], finite[block], loss[block] = answer
    return Score(digits, exact, finite, loss)


def tokens_to_read(layout: Layout) -> int:
    """What `score` will read, in tokens."""
    phase_rows, _ = _phase_rows(layout)
    blocks = list(_blocks(layout))
    suffixes = sum(len(block) * (layout.length - 1 - branch) for branch, block in blocks)
    return len(phase_rows) * blocks[-1][0] + suffixes


def accuracy(scores: Score) -> dict[str, Any]:
    """Accuracy of some prompts with Wilson 95% intervals, as a row of evaluation.json.

    Digits of one prompt stand or fall together, so the interval of `digits` counts prompts, not digits.
    """
    n = len(scores.exact)
    row: dict[str, Any] = {"prompts": n}
    for name, share in (("digits", scores.digits.mean()), ("exact", scores.exact.mean())):
        low, high = wilson_interval(float(share), n)
        row |= {name: float(share), f"{name}_low": low, f"{name}_high": high}
    finite = bool(scores.finite.all())
    return row | {"answer_loss": float(scores.loss.mean()) if finite else None, "non_finite": not finite}


def wilson_interval(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion `share` seen in n trials."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def select(scores: Score, rows: NDArray[np.bool_]) -> Score:
    """The scores of some prompts."""
    return Score(scores.digits[rows], scores.exact[rows], scores.finite[rows], scores.loss[rows])


def _lay(task: PasskeyTask, length: int, window: int, draws: NDArray[np.float64]) -> Layout:
    """Draws in [0, 1) of key, needle start and ending -> prompts, needles within the last `window` tokens."""
    keys = (draws[0] * task.n_keys).astype(np.int64)
    filler_length = window - task.fixed_length()
    starts = length - window + len(task.opening) + np.floor(draws[1] * (filler_length + 1)).astype(np.int64)
    return task.layout(length, keys, starts, (draws[2] * len(FILLER)).astype(np.int64))


def _phase_rows(layout: Layout) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One row of each phase, the one with the furthest needle, and the index of every row's phase."""
    phases, phase = np.unique(layout.phase, return_inverse=True)
    far_first = np.argsort(-layout.needle_start, kind="stable")
    return np.array([far_first[phase[far_first] == i][0] for i in range(len(phases))]), phase


def _blocks(layout: Layout) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Rows in the order of their needles, `BRANCH` at a time, and the position up to which a block shares."""
    order = np.argsort(layout.needle_start, kind="stable")
    for i in range(0, len(order), BRANCH):
        block = order[i : i + BRANCH]
        yield int(layout.needle_start[block[0]]), block


@torch.inference_mode()
def _answer(
    reader: Reader, rows: Layout, state: AnyState | None, begin: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float64]]:
    """Read from `begin` to the end; digits, exact, finite and loss of each row."""
    length = rows.length
    width = max(len(carries) for carries in rows.carries_digit)
    _, hidden = reader.read(rows.ids, state, begin, length - 1, keep=width)
    logits = reader.model.lm_head(hidden)
    ids = rows.ids(length - width, length)
    right = logits.argmax(-1).cpu().numpy() == ids
    finite = logits.isfinite().flatten(1).all(1).cpu().numpy()
    asked = rows.answer(length - width, length)
    digits = (right & asked).sum(1) / asked.sum(1)
    surprise = -logits.double().log_softmax(-1).gather(2, torch.from_numpy(ids[..., None]).to(logits.device))
    loss = np.where(asked, surprise[..., 0].cpu().numpy(), 0.0).sum(1) / asked.sum(1)
    return digits * finite, (right | ~asked).all(1) & finite, finite, np.where(finite, loss, np.inf)

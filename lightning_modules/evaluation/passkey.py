"""Passkey prompts to be measured by: recent needles, and needles over all depths."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from conf.passkey import FILLER
from data.layout import Layout
from data.passkey import PasskeyTask
from lightning_modules.evaluation import answers

# First word of every generator's seed: no training stream begins with it.
STREAM = 0x7E57
RECENT, RECALL = 0, 1
GRID = 10  # recent prompts that share the sentence before the question, and so all before their needles


def recent_prompts(task: PasskeyTask, length: int, window: int, n: int, seed: int) -> Layout:
    """Prompts whose last `window` tokens are laid out as a training prompt of `window` tokens is.

    The needle starts uniformly over what fits into the window, as in training, and the question ends it.
    Keys, distances and endings depend on the seed alone: every length asks the same questions over the same
    last tokens, so that lengths differ only in how much came before.
    """
    draws = np.random.default_rng([STREAM, seed, RECENT]).random((3, n))
    draws[2] = draws[2, np.arange(n) // GRID]
    return _lay(task, length, window, draws)


def recall_prompts(
    task: PasskeyTask, length: int, depths: int, per_depth: int, seed: int
) -> tuple[Layout, NDArray[np.float64]]:
    """Prompts with the needle anywhere, and the depth of each (n,).

    The range of a training needle, scaled to `length`, is cut into `depths` equal bins; a needle starts
    uniformly within its bin, whose middle is its depth in (0, 1). All bins together are the training
    distribution. One prompt of each depth make a grid, which shares all before its needles.
    """
    draws = np.random.default_rng([STREAM, seed, RECALL]).random((3, depths * per_depth))
    bins, grid = np.divmod(np.arange(depths * per_depth), per_depth)
    draws[2] = draws[2, grid]
    draws[1] = (bins + draws[1]) / depths
    return _lay(task, length, length, draws), (bins + 0.5) / depths


def accuracy(scores: answers.Score) -> dict[str, Any]:
    """A row of evaluation.json: the share of the answers' digits that are right, and of exact answers."""
    return answers.accuracy(scores, ("digits", "exact"))


def shortest_prompt(task: PasskeyTask, prompts: int, seed: int) -> int:
    """Tokens of the longest prompt without filler among the keys that `seed` draws."""
    draws = [np.random.default_rng([STREAM, seed, kind]).random((3, prompts))[0] for kind in (RECENT, RECALL)]
    return max(task.fixed_length(int(key)) for key in np.concatenate(draws) * task.n_keys)


def _lay(task: PasskeyTask, length: int, window: int, draws: NDArray[np.float64]) -> Layout:
    """Draws in [0, 1) of key, needle start and ending -> prompts, needles within the last `window` tokens."""
    keys = (draws[0] * task.n_keys).astype(np.int64)
    filler_length = window - task.fixed_length()
    starts = length - window + len(task.opening) + np.floor(draws[1] * (filler_length + 1)).astype(np.int64)
    return task.layout(length, keys, starts, (draws[2] * len(FILLER)).astype(np.int64), alike=True)

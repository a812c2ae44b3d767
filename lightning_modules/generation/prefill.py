"""Reads prompts of different lengths side by side: padding is never read, so it changes nothing.

Rows read on together as far as the shortest of them reaches; it leaves, the others go on. Whatever a
mitigation keeps (state, convolution, counters, windows) is then that of the prompt alone.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_modules.evaluation.streaming import Reader
from lightning_modules.state import ModelState

Prompt = NDArray[np.int64]


def read_prompts(
    reader: Reader, prompts: Sequence[Prompt], state: ModelState | None = None
) -> tuple[ModelState, Tensor]:
    """Read every prompt, of at least one token, from its row of `state` (None: from nothing).

    Returns:
        The state after the last token of each, and that token's final hidden state (B, d_model).
    """
    rows, begin = list(range(len(prompts))), 0
    left: list[int] = []
    states, hiddens = [], []
    for end in sorted({len(prompt) for prompt in prompts}):

        def source(low: int, high: int) -> NDArray[np.int64]:
            return np.stack([prompts[row][low:high] for row in rows])  # noqa: B023  # read at once

        after, hidden = reader.read(source, state, begin, end, keep=1)
        assert isinstance(after, ModelState)
        state = after
        ending = [i for i, row in enumerate(rows) if len(prompts[row]) == end]
        staying = [i for i, row in enumerate(rows) if len(prompts[row]) > end]
        if staying:
            states.append(state.rows(_index(ending, hidden)))
            state = state.rows(_index(staying, hidden))
        else:
            states.append(state)
        hiddens.append(hidden[_index(ending, hidden), -1])
        left += [rows[i] for i in ending]
        rows, begin = [rows[i] for i in staying], end
    if len(states) == 1:
        return states[0], hiddens[0]
    order = _index(sorted(range(len(left)), key=left.__getitem__), hiddens[0])
    return join(states).rows(order), torch.cat(hiddens)[order]


def join(states: Sequence[ModelState]) -> ModelState:
    """The rows of all states, in order."""
    columns: Iterable[tuple[Tensor, ...]] = zip(*(state.tensors() for state in states), strict=True)
    return states[0].with_tensors(torch.cat(column) for column in columns)


def _index(numbers: list[int], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=like.device)

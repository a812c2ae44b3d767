"""Which held-out text is for what, so that no number is reported on text that something was chosen on.

Documents: the training run's held-out documents in three parts that share no token. Passkey prompts, which no
training run has seen: a stream of random numbers for each.
"""

from dataclasses import replace
from typing import Literal

import numpy as np

from data.store import JoinedStreams, Stream, TokenStream

Split = Literal["test", "validation", "calibration"]
# The share of the held-out documents, by tokens, at which each begins and ends.
PARTS: dict[Split, tuple[float, float]] = {
    "calibration": (0.0, 0.2),
    "validation": (0.2, 0.5),
    "test": (0.5, 1.0),
}


def part_of(held_out: Stream, split: Split) -> Stream:
    """The tokens of a split, of every source its share; a document over its border is cut there."""
    if isinstance(held_out, JoinedStreams):
        return JoinedStreams(tuple(_part(stream, split) for stream in held_out.parts))
    return _part(held_out, split)


def _part(stream: TokenStream, split: Split) -> TokenStream:
    low, high = (stream.start + int(share * len(stream)) for share in PARTS[split])
    return replace(stream, start=low, stop=high)


def draw_seed(seed: int, split: Split) -> int:
    """The seed of a split's prompts: `seed` itself of the test split, a hash of it of another."""
    if split == "test":
        return seed
    return int(np.random.SeedSequence([seed, *split.encode()]).generate_state(1, np.uint64)[0])

"""From logits to the next tokens: one uniform number a row, turned into a token on the device.

A row's numbers come from a generator of its own, so what it samples depends neither on its neighbours nor on
the device that holds the logits.
"""

import numpy as np
import torch
from torch import Tensor

from conf.generate_schema import DecodingConfig

NON_FINITE = -1  # in place of a token where a row's logits hold NaN or infinity


class Sampler:
    """Chooses tokens of the first `vocab_size` ids: what a tokenizer cannot read is never chosen."""

    def __init__(self, config: DecodingConfig, vocab_size: int) -> None:
        self.config, self.vocab_size = config, vocab_size

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Tokens (B,) of logits (B, V); uniforms (B,) fp64 in [0, 1). Asks nothing of the device."""
        logits = logits[:, : self.vocab_size].float()
        finite = logits.isfinite().all(1)
        if self.config.temperature is None:
            tokens = logits.argmax(1)
        else:
            tokens = draw(distribution(logits, self.config), uniforms)
        return torch.where(finite, tokens, NON_FINITE)


def distribution(logits: Tensor, config: DecodingConfig) -> Tensor:
    """Probabilities (B, V) fp64 that are sampled from: of the temperature, then top_k, top_p and min_p, each
    of what the one before has left. Tokens as likely as the last one kept by top_k are kept too."""
    assert config.temperature is not None
    # The largest logit first: a tiny temperature must not overflow.
    logits = (logits.double() - logits.double().amax(1, keepdim=True)) / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[1]:
        least = logits.topk(config.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(1)
    if config.top_p is not None and config.top_p < 1:
        descending, order = probabilities.sort(stable=True, dim=1, descending=True)
        before = descending.cumsum(1) - descending  # the likeliest token has nothing before it and stays
        dropped = torch.zeros_like(order, dtype=torch.bool).scatter(1, order, before >= config.top_p)
        probabilities = probabilities.masked_fill(dropped, 0.0)
    if config.min_p is not None:
        least = config.min_p * probabilities.amax(1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    return probabilities / probabilities.sum(1, keepdim=True)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the cumulated probability (B, V) first exceeds the uniform number (B,)."""
    sums = probabilities.cumsum(1)
    total = sums[:, -1:].contiguous()
    # Rounding must not carry the number to the end of the last token that has a probability.
    place = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, place, right=True)[:, 0]


class Uniforms:
    """The numbers of each row, from generators of the row's own."""

    def __init__(self, seeds: list[int]) -> None:
        self._generators = [np.random.default_rng(seed) for seed in seeds]

    def next(self) -> Tensor:
        """(B,) fp64, on the CPU."""
        return torch.tensor([g.random() for g in self._generators], dtype=torch.float64)

"""Which tokens are sampled from, by plain definitions, and that rows do not see each other."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conf.generate_schema import DecodingConfig
from lightning_modules.generation.sampling import NON_FINITE, Sampler, Uniforms, distribution, draw

VOCABULARY = 12


def plain(logits: list[float], config: DecodingConfig) -> list[float]:
    """By the definitions, one token after the other."""
    assert config.temperature is not None
    largest = max(logits)
    weights = [float(np.exp((value - largest) / config.temperature)) for value in logits]
    alive = set(range(len(logits)))

    def probability(token: int) -> float:
        return weights[token] / sum(weights[i] for i in alive)

    if config.top_k is not None:
        kth = sorted(weights, reverse=True)[min(config.top_k, len(weights)) - 1]
        alive = {i for i in alive if weights[i] >= kth}
    if config.top_p is not None:
        kept: set[int] = set()
        for token in sorted(alive, key=lambda i: (-weights[i], i)):
            if sum(map(probability, kept)) < config.top_p:
                kept.add(token)
        alive = kept
    if config.min_p is not None:
        least = config.min_p * max(map(probability, alive))
        alive = {i for i in alive if probability(i) >= least}
    return [probability(i) if i in alive else 0.0 for i in range(len(logits))]


settings = st.fixed_dictionaries(
    {"temperature": st.sampled_from([1e-3, 0.3, 1.0, 2.5])},
    optional={
        "top_k": st.integers(1, VOCABULARY + 2),
        "top_p": st.sampled_from([1e-6, 0.1234, 0.5678, 0.9012, 1.0]),
        "min_p": st.sampled_from([0.0123, 0.2345, 1.0]),
    },
)


@given(settings=settings, seed=st.integers(0, 10_000))
def test_the_distribution_is_that_of_the_definitions(settings: dict[str, Any], seed: int) -> None:
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    config = DecodingConfig(**settings)
    actual = distribution(logits, config)
    expected = torch.tensor([plain(row.double().tolist(), config) for row in logits], dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(actual > 1e-12, expected > 1e-12)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.5}, [0]),  # the first alone reaches it
        ({"top_p": 0.51}, [0, 1]),
        ({"min_p": 0.3}, [0, 1]),
        ({"min_p": 0.2}, [0, 1, 2, 3]),
        ({"top_k": 1, "top_p": 0.9}, [0]),
        ({"top_k": 2, "top_p": 0.6}, [0]),  # two thirds of what top_k leaves
    ],
)
def test_by_hand(settings: dict[str, Any], kept: list[int]) -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/8: which tokens stay, and that they keep their ratios."""
    probabilities = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64)
    found = distribution(
        probabilities.log2().float() * float(np.log(2)), DecodingConfig(temperature=1.0, **settings)
    )
    expected = torch.zeros(4, dtype=torch.float64)
    expected[kept] = probabilities[0, kept] / probabilities[0, kept].sum()
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=0)


def test_equally_likely_tokens_stay_together_under_top_k() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    found = distribution(logits, DecodingConfig(temperature=1.0, top_k=2))
    assert (found > 0).tolist() == [[True, True, True, False]]


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([[0.1, 0.0, 0.6, 0.3]], dtype=torch.float64)
    uniforms = Uniforms([5])
    counts = np.zeros(4)
    for _ in range(4000):
        counts[int(draw(probabilities, uniforms.next()))] += 1
    assert counts[1] == 0
    np.testing.assert_allclose(counts / 4000, [0.1, 0, 0.6, 0.3], atol=0.03)  # 4 standard errors


def test_the_ends_of_the_unit_interval_hit_tokens_that_have_a_probability() -> None:
    probabilities = torch.tensor([[0.0, 0.3, 0.7, 0.0]] * 2, dtype=torch.float64)
    last = np.nextafter(1.0, 0.0)
    assert draw(probabilities, torch.tensor([0.0, last], dtype=torch.float64)).tolist() == [1, 2]


def test_without_a_temperature_the_likeliest() -> None:
    logits = torch.randn(5, VOCABULARY)
    chosen = Sampler(DecodingConfig(), VOCABULARY)(logits, torch.rand(5).double())
    assert torch.equal(chosen, logits.argmax(1))


def test_a_low_temperature_is_the_likeliest_too() -> None:
    logits = torch.randn(5, VOCABULARY)
    chosen = Sampler(DecodingConfig(temperature=1e-30), VOCABULARY)(logits, torch.rand(5).double())
    assert torch.equal(chosen, logits.argmax(1))


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_ids_beyond_the_tokenizer_are_never_chosen(temperature: float | None) -> None:
    logits = torch.zeros(200, VOCABULARY)
    logits[:, 8:] = 50.0
    chosen = Sampler(DecodingConfig(temperature=temperature), 8)(logits, Uniforms([*range(200)]).next())
    assert int(chosen.max()) < 8


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [None, 1.0])
def test_non_finite_logits_are_told_of_their_row_alone(temperature: float | None, bad: float) -> None:
    logits: Tensor = torch.randn(3, VOCABULARY)
    logits[1, 4] = bad
    chosen = Sampler(DecodingConfig(temperature=temperature), VOCABULARY)(logits, torch.rand(3).double())
    assert (chosen == NON_FINITE).tolist() == [False, True, False]


def test_a_rows_numbers_are_its_own() -> None:
    together, alone = Uniforms([3, 4, 5]), Uniforms([4])
    for _ in range(5):
        numbers = together.next()
        assert numbers[1] == alone.next()[0]
        assert len(set(numbers.tolist())) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"^temperature=0\.0: must be positive"),
        ({"temperature": -1.0}, r"^temperature=-1\.0: must be positive"),
        ({"temperature": float("inf")}, r"^temperature=inf: must be positive"),
        ({"temperature": 1.0, "top_p": 0.0}, r"^top_p=0\.0: must lie in \(0, 1\]$"),
        ({"temperature": 1.0, "top_p": 1.1}, r"^top_p=1\.1: must lie in"),
        ({"temperature": 1.0, "min_p": 0.0}, r"^min_p=0\.0: must lie in"),
        ({"temperature": 1.0, "top_k": 0}, r"^top_k=0: must be at least 1$"),
        ({"top_k": 5}, r"^top_k=5: belongs to sampling; set temperature"),
        ({"max_new_tokens": -1}, r"max_new_tokens=-1: must be at least 0$"),
        ({"seed": -1}, r"seed=-1: must be at least 0$"),
        ({"segment_length": 0}, r"^segment_length=0: must be at least 1$"),
        ({"stop": [""]}, r"^stop=\[''\]: an empty text"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodingConfig(**settings)

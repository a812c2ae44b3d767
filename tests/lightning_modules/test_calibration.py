"""Calibrations: known answers of a hand-set model, of hand-made numbers, of a loss with a known minimum."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import ModelConfig, PasskeyConfig
from data.passkey import PasskeyTask
from data.tokenizers import load_tokenizer
from kernels.ssd import Mitigation
from lightning_modules.backbone import Mamba2LM
from lightning_modules.calibration.search import search
from lightning_modules.calibration.statistics import mixers, state_norms, threshold_table, time_steps
from lightning_modules.evaluation.loss import prompts_source
from lightning_modules.evaluation.streaming import Reader

LENGTH = 60
RETENTIONS = [[0.5, 1 - 1e-3, 0.9], [1 - 1e-6, 0.99, 0.2]]  # a token, by layer and head
DT = [0.5, 0.01, 2.0]


@pytest.fixture
def hand_set() -> Mamba2LM:
    """Every token inserts the same: dt, x and B are constant, each head forgets at a rate of its own."""
    config = ModelConfig(d_model=12, n_layers=2, headdim=8, expand=2, d_state=4, chunk_size=16)
    model = Mamba2LM(config)
    with torch.no_grad():
        for mixer, retentions in zip(mixers(model), RETENTIONS, strict=True):
            dt = torch.tensor(DT, dtype=torch.float64)
            mixer.in_proj.weight[-3:] = 0.0
            mixer.dt_bias.copy_(dt.expm1().log())
            mixer.A_log.copy_((-torch.tensor(retentions, dtype=torch.float64).log() / dt).log())
            mixer.conv1d.weight.zero_()
            mixer.conv1d.bias.fill_(1.0)
    return model.eval()


def newline(begin: int, end: int) -> np.ndarray:
    return np.full((2, end - begin), 10)


def test_norms_are_those_of_the_recurrence(hand_set: Mamba2LM) -> None:
    """|h_t| = dt |x| |B| (1 - a^t) / (1 - a), with x and B all silu(1)."""
    inserted = 1 / (1 + math.exp(-1))
    reader = Reader(hand_set, Mitigation(), segment=37)
    norms = state_norms(reader, newline, LENGTH, stride=25)
    assert norms.shape == (2, 3, 2, 3)  # after 25, 50 and 60 tokens
    a = torch.tensor(RETENTIONS, dtype=torch.float64)
    for i, t in enumerate((25, 50, 60)):
        expected = torch.tensor(DT) * inserted**2 * math.sqrt(8 * 4) * (1 - a**t) / (1 - a)
        torch.testing.assert_close(norms[0, i].double(), expected, rtol=1e-4, atol=0)
    assert torch.equal(norms[0], norms[1])


def test_time_steps_and_retention_are_those_of_the_model(hand_set: Mamba2LM) -> None:
    dt, log_retention = time_steps(Reader(hand_set, Mitigation(), segment=37), newline, LENGTH)
    expected = torch.tensor(DT).expand(2, LENGTH, 2, 3)
    torch.testing.assert_close(dt, expected, rtol=1e-5, atol=0)
    whole = LENGTH * torch.tensor(RETENTIONS, dtype=torch.float64).log()
    torch.testing.assert_close(log_retention[1], whole, rtol=1e-5, atol=0)
    table = threshold_table(dt, log_retention, [LENGTH, 8 * LENGTH], retention=0.05, clamp=0.05)
    assert not table[0].any()
    # 0.99^60 = 0.55, 0.999^60 = 0.94 and (1 - 1e-6)^60 are above 0.05; 0.9^60 = 0.002 is not
    assert (table[1] > 0).tolist() == [[False, True, False], [True, True, False]]


def test_a_table_of_hand_made_numbers() -> None:
    """L = 10, sum 40: for S = 20 the largest that come to 20 pass, for S = 80 those that come to 5."""
    dt = torch.tensor([1.0, 1, 2, 2, 3, 3, 4, 6, 8, 10]).view(1, 10, 1, 1)
    remembers = torch.zeros(1, 1, 1, dtype=torch.float64)

    def table(clamp: float) -> list[float]:
        return threshold_table(dt, remembers, [10, 20, 80, 4000], 0.05, clamp).flatten().tolist()

    assert table(0.0) == [0.0, 8.0, 10.0, 10.0]
    # the largest three count as 6 each: 34 in all, 17 may pass; those three always do
    assert table(0.3) == [0.0, 6.0, 6.0, 6.0]
    assert not threshold_table(dt, remembers - 4, [10, 20], 0.05, 0.0).any()  # keeps 0.02


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.1]), st.floats(1.0, 50.0))
def test_what_passes_decays_as_a_training_text_does(seed: int, clamp: float, factor: float) -> None:
    """S times the mean of what passes is at most L times the mean of all, and the next dt would exceed it."""
    generator = torch.Generator().manual_seed(seed)
    dt = torch.empty(2, 100, 1, 3).exponential_(generator=generator)
    table = threshold_table(
        dt, torch.zeros(2, 1, 3, dtype=torch.float64), [100, int(100 * factor)], 0.5, clamp
    )
    samples = dt.double().flatten(0, 2)
    if clamp:
        samples = samples.minimum(samples.sort(0).values[-20])
    threshold = table[-1, 0]
    passing = torch.where(samples >= threshold, samples, 0.0)
    allowed = 100 * samples.sum(0) / int(100 * factor)
    least = 20 if clamp else 1
    few = (passing > 0).sum(0) <= least
    assert (few | (passing.sum(0) <= allowed * (1 + 1e-6))).all()
    below = torch.where(samples < threshold, samples, 0.0).amax(0)
    assert ((below == 0) | (passing.sum(0) + below > allowed)).all()


def test_the_search_finds_a_known_minimum() -> None:
    """Of 4 factors, one of them far from 1, in exactly the evaluations given, the same every time."""
    goal, calls = np.log([2.5, 1.0, 0.8, 1.3]), []

    def loss(factors: list[float]) -> float:
        calls.append(factors)
        return 3.0 + float(((np.log(factors) - goal) ** 2).sum())

    options: dict[str, Any] = {"perturbation": 0.05, "step": 0.2, "seed": 3}
    found = search(loss, 4, evaluations=200, **options)
    assert len(calls) == 200
    assert calls[0] == [1.0] * 4
    assert found.neutral_loss == loss([1.0] * 4)
    assert np.abs(np.log(found.factors) - goal).max() < 0.15
    assert found == search(loss, 4, evaluations=200, **options)
    assert found != search(loss, 4, evaluations=200, **options | {"seed": 4})


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_the_search_is_never_worse_than_its_start(bad: float) -> None:
    """Where every change hurts, or gives no number at all, the factors stay 1."""
    found = search(
        lambda f: 1.0 if f == [1.0, 1.0] else bad, 2, evaluations=9, perturbation=0.1, step=0.2, seed=0
    )
    assert (found.factors, found.loss, found.neutral_loss) == ([1.0, 1.0], 1.0, 1.0)
    # infinite on one side only: the other is taken
    found = search(lambda f: bad if f[0] > 1 else f[0], 1, evaluations=9, perturbation=0.1, step=0.2, seed=0)
    assert found.factors[0] < 0.8


def test_the_answers_of_a_text_are_the_digits_behind_its_questions() -> None:
    """Two prompts one after another: five digits each, those of the text's own last tokens."""
    task = PasskeyTask(load_tokenizer("bytes"), PasskeyConfig())
    ids = prompts_source(task, 160, 3, seed=4)(0, 321)
    asked = prompts_source(task, 160, 3, seed=4, field="answer")(0, 320)
    assert asked.shape == (3, 320)
    assert asked.sum(1).tolist() == [10, 10, 10]
    for row, here in zip(ids, asked, strict=True):
        digits = bytes(row[1:][here].tolist()).decode()
        assert digits == bytes([*row[155:160], *row[315:320]]).decode()
        assert digits.isdigit()

"""Reading in segments changes neither results nor memory."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conf.schema import ModelConfig, PasskeyConfig
from data.passkey import PasskeyTask
from data.tokenizers import ByteTokenizer
from kernels.ssd import Mitigation
from lightning_modules.backbone import Mamba2LM
from lightning_modules.evaluation.loss import loss_by_position, prompts_source, unigram_loss
from lightning_modules.evaluation.streaming import Reader

MITIGATIONS = {
    "none": Mitigation(),
    "forget_more": Mitigation(name="forget_more", alpha_scale=0.99, insert_scale=0.8),
    "decay_scale": Mitigation(name="decay_scale", decay_scale=1.5),
    "state_norm": Mitigation(name="state_norm", max_norm=0.003, every=50),
    "sliding_window": Mitigation(name="sliding_window", window=30),
    "hard_reset": Mitigation(name="hard_reset", every=70),
}
ROWS, LENGTH = 3, 333


@pytest.fixture
def model() -> Mamba2LM:
    return Mamba2LM(ModelConfig(d_model=16, d_state=8, headdim=8, chunk_size=16, vocab_size=40)).eval()


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 40, (ROWS, LENGTH + 1))


@pytest.mark.parametrize("segment", [1, 40, 100, 10_000])
@pytest.mark.parametrize("name", MITIGATIONS)
def test_segments_of_any_size_read_alike(
    model: Mamba2LM, ids: np.ndarray, name: str, segment: int, check_close: Callable[..., None]
) -> None:
    mitigation = MITIGATIONS[name]
    reader = Reader(model, mitigation, segment)
    state, none_kept = reader.read(lambda a, b: ids[:, a:b], None, 0, 200)
    state, kept = reader.read(lambda a, b: ids[:, a:b], state, 200, LENGTH, keep=50)
    with torch.inference_mode():
        hidden, whole = model.hidden(torch.from_numpy(ids[:, :LENGTH]), mitigation=mitigation)
    assert none_kept.numel() == 0
    check_close(kept, hidden[:, -50:], 1e-5, "hidden")
    for ours, theirs in zip(state.layers, whole.layers, strict=True):
        for actual, expected in zip(ours.tensors(), theirs.tensors(), strict=True):
            check_close(actual, expected, 1e-5, "state")
    assert reader.tokens == ROWS * LENGTH


def test_nothing_of_a_source_is_held_beyond_a_segment(
    model: Mamba2LM, ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, asked = [], []
    hidden = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda ids, *a, **k: (passes.append(ids.numel()), hidden(ids, *a, **k))[1]
    )
    reader = Reader(model, Mitigation(), segment=100)

    def source(begin: int, end: int) -> np.ndarray:
        asked.append(end - begin)
        return ids[:, begin:end]

    reader.read(source, None, 0, LENGTH)
    list(reader.losses(source, LENGTH))
    assert max(passes) <= 100
    assert max(asked) <= 100 // ROWS
    assert sum(passes) == 2 * ROWS * LENGTH


def test_an_empty_stretch_changes_nothing(model: Mamba2LM, ids: np.ndarray) -> None:
    reader = Reader(model, Mitigation(), 64)
    assert reader.read(lambda a, b: ids[:, a:b], None, 0, 0)[0] is None
    state, _ = reader.read(lambda a, b: ids[:, a:b], None, 0, 5)
    assert reader.read(lambda a, b: ids[:, a:b], state, 5, 5)[0] is state


@pytest.mark.parametrize(("segment", "bucket"), [(10_000, 37), (64, 37), (50, 333), (7, 1)])
def test_loss_by_position_is_that_of_full_logits(
    model: Mamba2LM, ids: np.ndarray, segment: int, bucket: int
) -> None:
    measured = loss_by_position(
        Reader(model, Mitigation(), segment), lambda a, b: ids[:, a:b], LENGTH, bucket
    )
    with torch.inference_mode():
        logits = model(torch.from_numpy(ids[:, :-1])).logits
        losses = F.cross_entropy(logits.transpose(1, 2), torch.from_numpy(ids[:, 1:]), reduction="none")
    by_position = losses.mean(0).split(bucket)
    np.testing.assert_allclose(measured["loss"], [part.mean().item() for part in by_position], rtol=1e-5)
    by_prompt = torch.stack([part.double().mean(1) for part in losses.split(bucket, 1)], 1)
    np.testing.assert_allclose(measured["error"], by_prompt.std(0) / ROWS**0.5, rtol=1e-4)
    positions = torch.arange(1, LENGTH + 1, dtype=torch.float64).split(bucket)
    assert measured["position"] == [part.mean().item() for part in positions]
    assert not measured["non_finite"]


def test_a_bucket_that_met_nan_has_no_loss(model: Mamba2LM, ids: np.ndarray) -> None:
    with torch.no_grad():
        model.backbone.embedding.weight[7] = torch.nan
    ids[ids == 7] = 8
    ids[0, 200] = 7
    measured = loss_by_position(Reader(model, Mitigation(), 64), lambda a, b: ids[:, a:b], LENGTH, 100)
    assert measured["non_finite"]
    # Tied embeddings: token 7 spoils every softmax.
    assert measured["loss"] == measured["error"] == [None] * 4


def test_one_prompt_has_no_standard_error(model: Mamba2LM, ids: np.ndarray) -> None:
    measured = loss_by_position(Reader(model, Mitigation(), 64), lambda a, b: ids[:1, a:b], LENGTH, 100)
    assert None not in measured["loss"]
    assert measured["error"] == [None] * 4


def test_the_unigram_loss_is_that_of_the_texts_own_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequencies of 8 tokens, 5 of them 1s; the first 4 are two 1s and two others."""
    monkeypatch.setattr("lightning_modules.evaluation.loss.PIECE", 3)
    ids = np.array([[9, 1, 0, 1, 1], [9, 1, 7, 0, 1]])
    expected = -(2 * np.log(5 / 8) + np.log(2 / 8) + np.log(1 / 8)) / 4
    assert unigram_loss(lambda a, b: ids[:, a:b], 2, 4) == pytest.approx(expected)
    whole = -(5 * np.log(5 / 8) + 2 * np.log(2 / 8) + np.log(1 / 8)) / 8
    assert unigram_loss(lambda a, b: ids[:, a:b], 4, 4) == pytest.approx(whole), "their entropy"


def test_any_stretch_of_the_prompts_is_cut_from_one_text() -> None:
    task = PasskeyTask(ByteTokenizer(), PasskeyConfig())
    source = prompts_source(task, 150, 3, seed=1)
    whole = source(0, 700)
    assert whole.shape == (3, 700)
    for begin, end in ((0, 1), (149, 151), (150, 300), (333, 677), (699, 700)):
        np.testing.assert_array_equal(source(begin, end), whole[:, begin:end])
    texts = [task.tokenizer.decode(row[i : i + 150]) for row in whole for i in range(0, 600, 150)]
    assert all(text.count("The passkey is") == 2 and text[-1].isdigit() for text in texts)
    assert len({text[-5:] for text in texts}) > 8  # a key each

"""The probe measures what the recurrence does, and changes nothing."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.schema import ModelConfig
from kernels.ssd import Mitigation, ssd_scan
from kernels.ssd.discretize import discretize
from lightning_modules.backbone import Mamba2LM
from lightning_modules.diagnosis import probe as probes
from lightning_modules.diagnosis.prompts import random_source
from lightning_modules.diagnosis.reading import read_prompt, strides
from lightning_modules.diagnosis.remembrance import effective_remembrance, starts, tokens_to_read
from lightning_modules.diagnosis.statistics import state_measures
from lightning_modules.evaluation.streaming import Reader

ROWS, LENGTH, STRIDE, TRAIN_LENGTH = 2, 300, 24, 96
MITIGATIONS = {
    "none": Mitigation(),
    "forget_more": Mitigation("forget_more", alpha_scale=0.97, insert_scale=0.5),
    "some_heads": Mitigation("forget_more", alpha_scale=0.97, insert_scale=0.5, heads=(1,)),
    "sliding_window": Mitigation("sliding_window", window=31),
    "state_norm": Mitigation("state_norm", max_norm=0.01, every=7),
    "token_filter": Mitigation("token_filter", threshold=0.02),
}


@pytest.fixture
def model() -> Mamba2LM:
    config = ModelConfig(
        d_model=16, d_state=8, headdim=8, n_layers=2, n_groups=2, chunk_size=16, vocab_size=40
    )
    return Mamba2LM(config).eval()


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 40, (ROWS, LENGTH + 1))


def recorded(model: Mamba2LM, ids: np.ndarray, mitigation: Mitigation) -> list[tuple[tuple, dict]]:
    """The arguments of every layer's scan over the whole prompt at once."""
    calls: list[tuple[tuple, dict]] = []

    def scan(*arguments: Tensor, **options: object) -> tuple[Tensor, object]:
        calls.append((arguments, options))
        return ssd_scan(*arguments, **options)

    for layer in model.backbone.layers:
        layer.mixer.scan = scan
    with torch.inference_mode():
        model.hidden(torch.from_numpy(ids[:, :LENGTH]), mitigation=mitigation)
    for layer in model.backbone.layers:
        layer.mixer.scan = None
    return calls


@pytest.mark.parametrize("segment", [10, 60, 100, 10_000])
@pytest.mark.parametrize("name", MITIGATIONS)
def test_measures_are_those_of_the_recurrence_in_segments_of_any_size(
    model: Mamba2LM, ids: np.ndarray, name: str, segment: int, check_close: Callable[..., None]
) -> None:
    mitigation, probe = MITIGATIONS[name], probes.StateProbe(model, top_share=0.1)
    reader = Reader(model, mitigation, segment)
    plain = [losses for _, losses in reader.losses(lambda a, b: ids[:, a:b], LENGTH)]
    probe.stride, taken, losses = STRIDE, [], []
    with probe.attached():
        for _, some, _ in reader.losses_from(lambda a, b: ids[:, a:b], None, 0, LENGTH, STRIDE):
            losses.append(some)
            taken.append(probe.take())
    assert model.backbone.layers[0].mixer.scan is None
    check_close(torch.cat(losses, 1), torch.cat(plain, 1), 1e-5, "losses")
    values = {measure: np.concatenate([some[measure] for some in taken]) for measure in probes.MEASURES}
    count = LENGTH // STRIDE
    for layer, ((x, dt, A, B, C), options) in enumerate(recorded(model, ids, mitigation)):
        *_, states = ssd_scan(x, dt, A, B, C, **options, states_every=STRIDE, backend="naive")
        measured, energy = state_measures(states, 0.1)
        for measure, expected in zip(probes.STATE_MEASURES, measured, strict=True):
            actual = torch.from_numpy(values[measure][:, layer])
            check_close(actual, expected, 1e-4, measure, floor=measured[2].detach().norm().item())
        check_close(probe.channels()[layer], energy[-1], 1e-4, "channels")
        if name == "some_heads":
            alpha, insert = torch.tensor([1, 0.97, 1, 1]), torch.tensor([1, 0.5, 1, 1])
            mitigation = Mitigation("forget_more", alpha_scale=alpha, insert_scale=insert)
        how = (options["dt_bias"], True, options["dt_limit"], mitigation)
        log_decay, insert = discretize(dt, A.double(), *how)
        retention = log_decay[:, 1:].cumsum(1)[:, STRIDE - 2 :: STRIDE].mean(0)
        check_close(torch.from_numpy(values["log_retention"][:, layer]), retention, 1e-5, "log_retention")
        heads = B.repeat_interleave(x.shape[2] // B.shape[2], 2)
        norms = torch.einsum("bthp,bthn->bthpn", x, heads).flatten(3).norm(dim=3)
        for measure, tokens in (
            ("log_decay", log_decay),
            ("insertion", insert * norms),
            ("dt", insert / mitigation.insert_scale),
        ):
            expected = tokens[:, : count * STRIDE].unflatten(1, (count, STRIDE)).mean((0, 2))
            check_close(torch.from_numpy(values[measure][:, layer]), expected, 1e-4, measure)


def test_insertions_of_some_tokens_stand_for_all_at_a_wide_stride(
    model: Mamba2LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.random.default_rng(1).integers(0, 40, (4, 2049))
    measured = []
    for norms in (1024, 128):
        monkeypatch.setattr(probes, "NORMS", norms)
        probe = probes.StateProbe(model)
        probe.stride = 1024
        with probe.attached():
            list(
                Reader(model, Mitigation(), 10_000).losses_from(lambda a, b: ids[:, a:b], None, 0, 2048, 1024)
            )
        measured.append(probe.take()["insertion"])
    np.testing.assert_allclose(measured[1], measured[0], rtol=0.15)
    assert not np.array_equal(*measured)


def test_a_failed_forward_pass_leaves_the_model_as_it_was(model: Mamba2LM) -> None:
    probe = probes.StateProbe(model)
    with pytest.raises(RuntimeError, match="amiss"), probe.attached():
        raise RuntimeError("amiss")
    assert all(layer.mixer.scan is None for layer in model.backbone.layers)
    assert all(len(values) == 0 for values in probe.take().values())


def read(model: Mamba2LM, **settings: int | None):
    options = {
        "train_length": TRAIN_LENGTH,
        "length": 4 * TRAIN_LENGTH,
        "stride": 40,
        "bucket": 24,
        **settings,
    }
    source = random_source(40, 2, seed=3)
    return read_prompt(Reader(model, Mitigation(), 64), probes.StateProbe(model), source, **options)


def test_a_prompt_is_measured_densely_inside_and_at_the_stride_beyond(model: Mamba2LM) -> None:
    measures = read(model)
    inside = measures.positions[measures.inside]
    np.testing.assert_array_equal(inside, np.arange(3, TRAIN_LENGTH + 1, 3))
    np.testing.assert_array_equal(measures.positions[~measures.inside], TRAIN_LENGTH + 40 * np.arange(1, 8))
    assert {len(values) for values in measures.values.values()} == {len(measures.positions)}
    assert len(measures.loss["loss"]) == 16
    assert measures.non_finite is None
    shape = (4, 8, 8)
    assert [channels.shape for channels in measures.channels_end] == [shape, shape]
    assert not np.allclose(measures.channels_inside[0], measures.channels_end[0])


@pytest.mark.parametrize("length", [1 << 12, 1 << 20, 1 << 30])
def test_the_number_of_samples_is_bounded_whatever_the_length(length: int) -> None:
    fine, coarse = strides(256, length, None)
    assert 256 // fine >= 16
    assert length // coarse <= 512


@pytest.mark.parametrize("train_length", [1, 2, 31, 257])
def test_odd_training_lengths_have_samples_inside_and_beyond(model: Mamba2LM, train_length: int) -> None:
    measures = read(model, train_length=train_length, length=5 * train_length, stride=None, bucket=1)
    assert measures.inside.sum() >= min(train_length, 16)
    assert (~measures.inside).sum() >= 4
    assert all(np.isfinite(values).all() for values in measures.values.values())


def test_reading_ends_at_the_first_state_that_is_not_finite(model: Mamba2LM) -> None:
    with torch.no_grad():
        model.backbone.layers[1].mixer.A_log[2] = torch.nan  # head 2 of layer 1 alone
    measures = read(model)
    assert measures.non_finite is not None
    where = measures.non_finite
    assert (where.layer, where.head, where.position) == (1, 2, 3)
    assert len(measures.positions) == 0


def test_effective_remembrance_is_the_distance_of_the_two_distributions(model: Mamba2LM) -> None:
    length, source = 100, random_source(40, 2, seed=5)
    reader = Reader(model, Mitigation(), 64)
    found = effective_remembrance(reader, source, length)
    ids = torch.from_numpy(source(0, length))
    with torch.inference_mode():
        whole = model(ids).logits[:, -25:].softmax(-1)
        for start, distance in zip(found["start"], found["distance"], strict=True):
            part = model(ids[:, start:]).logits[:, -25:].softmax(-1)
            assert distance == pytest.approx(0.5 * (whole - part).abs().sum(-1).mean().item(), rel=1e-3)
    assert found["start"] == starts(length)
    assert (found["start"][0], found["start"][-1]) == (1, 75)
    assert reader.tokens == tokens_to_read(length, 2)
    assert starts(8)[-1] == 6

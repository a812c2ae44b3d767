"""A diagnosis of a model whose every number is known by hand (`constructed.py`)."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.ssd import Mitigation
from lightning_modules.diagnose import main
from lightning_modules.diagnosis.probe import StateProbe
from lightning_modules.diagnosis.prompts import repeat
from lightning_modules.evaluation.streaming import Reader
from tests.lightning_modules.constructed import (
    INSERTION,
    LOG_DECAY,
    NEWLINE,
    TRAIN_LENGTH,
    constructed_model,
    newline_losses,
    save_constructed,
    sums,
)

LENGTH = 16 * TRAIN_LENGTH


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_constructed(tmp_path_factory.mktemp("constructed") / "model")


def diagnose(checkpoint: Path, run_dir: Path, *settings: str) -> dict[str, Any]:
    main([f"checkpoint={checkpoint}", f"run_dir={run_dir}", "tracking.enabled=false", *settings])
    return json.loads((run_dir / "diagnosis.json").read_text())


def test_names_the_head_that_never_forgets_and_its_retention(checkpoint: Path, tmp_path: Path) -> None:
    found = diagnose(checkpoint, tmp_path, "prompt=random", "prompts=2")
    (collapsed,), (retaining,) = found["collapsed_heads"], found["over_retaining_heads"]
    growth = (sums(LENGTH, LOG_DECAY[0]) / sums(TRAIN_LENGTH, LOG_DECAY[0])) ** 2
    assert (collapsed["layer"], collapsed["head"]) == (0, 0)
    assert collapsed["variance_ratio"] == pytest.approx(growth, rel=1e-4)
    assert collapsed["variance_inside"] == pytest.approx(
        INSERTION.var() * sums(TRAIN_LENGTH, LOG_DECAY[0]) ** 2, rel=1e-4
    )
    twice = TRAIN_LENGTH * 2  # S grows in proportion to t: its square is above 4 right after
    assert twice < collapsed["exceeds"] <= twice + found["strides"][1]

    assert (retaining["layer"], retaining["head"]) == (0, 0)
    assert retaining["retention"] == pytest.approx(math.exp((TRAIN_LENGTH - 1) * LOG_DECAY[0]), abs=1e-9)
    assert retaining["half_life"] == pytest.approx(-math.log(2) / LOG_DECAY[0], rel=1e-4)
    assert retaining["half_life_extrapolated"]
    other = found["heads"][1]
    assert other["retention"] == pytest.approx(math.exp((TRAIN_LENGTH - 1) * LOG_DECAY[1]), rel=1e-4)
    assert other["half_life"] == pytest.approx(-math.log(2) / LOG_DECAY[1], rel=1e-4)
    assert not other["half_life_extrapolated"]
    assert other["variance_ratio"] == pytest.approx(1.0, abs=0.01)
    for head in found["heads"]:
        assert head["dt"] == pytest.approx(1.0, rel=1e-6)
        assert head["insertion"] == pytest.approx(np.linalg.norm(INSERTION), rel=1e-5)


@pytest.mark.parametrize("ratio", [100.0, 10_000.0])
def test_collapse_begins_where_the_loss_by_hand_exceeds_its_limit(
    checkpoint: Path, tmp_path: Path, ratio: float
) -> None:
    found = diagnose(checkpoint, tmp_path, "prompt=newline", "bucket=8", f"thresholds.loss_ratio={ratio}")
    buckets = newline_losses(LENGTH).reshape(-1, 8).mean(1)
    inside = buckets[: TRAIN_LENGTH // 8]
    above = np.flatnonzero(buckets[len(inside) :] > ratio * inside.max())
    expected = None if len(above) == 0 else TRAIN_LENGTH + 8 * int(above[0]) + 1
    assert found["collapse_position"] == expected
    assert (expected is None) == (ratio == 10_000.0)
    np.testing.assert_allclose(found["loss"]["loss"], buckets, rtol=1e-3, atol=1e-5)
    collapse = found["collapse"]
    assert collapse["solved"] is True
    assert collapse["loss_inside_max"] == pytest.approx(inside.max(), rel=1e-3)
    assert found["thresholds"]["loss_ratio"] == ratio
    verdict = f"No collapse to {LENGTH:,} tokens" if expected is None else f"Collapse at token {expected:,}"
    assert found["findings"][0].startswith(verdict)


def test_a_guess_is_unsolved_and_no_collapse(checkpoint: Path, tmp_path: Path) -> None:
    found = diagnose(
        checkpoint, tmp_path, "prompt=sentence", "sentence=ab"
    )  # no newline in it: all at chance
    assert found["collapse"]["solved"] is False
    assert found["collapse_position"] is None
    assert found["findings"][0].startswith(f"Unsolved at its own length of {TRAIN_LENGTH} tokens")
    assert json.loads((tmp_path / "result.json").read_text())["metrics"]["collapse/position"] == 0


STEPS = np.arange(1, LENGTH + 1)
NORM = float(np.linalg.norm(INSERTION))


def clipped(limit: float, every: int, log_decay: float) -> np.ndarray:
    held, total = [], 0.0
    for t in STEPS:
        total = math.exp(log_decay) * total + 1.0
        if t % every == 0:
            total = min(total, limit / NORM)
        held.append(total)
    return np.array(held)


# Mitigation -> what a head holds after t tokens by its formula, and a bound on it, in units of x B^T.
FORMULAS = {
    "forget_more": (
        Mitigation("forget_more", alpha_scale=0.98, insert_scale=0.5),
        lambda a: 0.5 * sums(STEPS, a + math.log(0.98)),
        0.5 / (1 - 0.98),
    ),
    "decay_scale": (
        Mitigation("decay_scale", decay_scale=3.0),
        lambda a: sums(STEPS, 3 * a),
        LENGTH,
    ),
    "delta_scale": (
        Mitigation("delta_scale", delta_scale=0.25),
        lambda a: 0.25 * sums(STEPS, 0.25 * a),
        0.25 * LENGTH,
    ),
    "state_norm": (
        Mitigation("state_norm", max_norm=20 * NORM, every=10),
        lambda a: clipped(20 * NORM, 10, a),
        20 + 10,
    ),
    "sliding_window": (
        Mitigation("sliding_window", window=37),
        lambda a: sums(np.minimum(STEPS, 37), a),
        37,
    ),
    "hard_reset": (
        Mitigation("hard_reset", every=50),
        lambda a: sums((STEPS - 1) % 50 + 1, a),
        50,
    ),
    "token_filter": (
        Mitigation("token_filter", threshold=torch.tensor([2.0, 0.5])),
        lambda a: 0.0 * STEPS if a == LOG_DECAY[0] else sums(STEPS, a),
        10,
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_each_mitigation_bounds_the_states_as_its_formula_says(name: str) -> None:
    mitigation, formula, bound = FORMULAS[name]
    model = constructed_model()
    probe, reader = StateProbe(model), Reader(model, mitigation, 256)
    probe.stride = 8
    with probe.attached():
        for _ in reader.losses_from(repeat(np.array([NEWLINE]), 1), None, 0, LENGTH, 8):
            pass
    rms = probe.take()["rms"]  # (n, 1, heads)
    unit = math.sqrt((INSERTION**2).mean())
    for head, log_decay in enumerate(LOG_DECAY):
        expected = formula(log_decay)[7::8]
        np.testing.assert_allclose(rms[:, 0, head] / unit, expected, rtol=2e-5, atol=1e-7)
        assert (rms[:, 0, head] / unit <= bound * (1 + 1e-5)).all()
    free = sums(STEPS, LOG_DECAY[0])[-1]
    assert bound < free or name in ("decay_scale",)  # what decay_scale cannot do: reach a retention of 1

"""The states suite on a model whose states are known in closed form."""

import json
import math

import numpy as np
import pytest

from conf.load import parse
from conf.measure_schema import EvaluateConfig
from lightning_modules.evaluate import main
from lightning_modules.evaluation.states import state_metrics
from tests.lightning_modules.constructed import INSERTION, LOG_DECAY, TRAIN_LENGTH, save_constructed, sums


def test_growth_and_retention_of_every_head_follow_the_formula(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("What is read does not matter here.\n" * 2000)
    checkpoint = save_constructed(tmp_path / "model", f"data.documents.source={tmp_path}/text.txt")
    arguments = [f"checkpoint={checkpoint}", f"run_dir={tmp_path}/out", "suites=[states]"]
    main([*arguments, "tracking.enabled=false", "states.prompts=2", "device=cpu", "threads=1"])
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["states"]["length"] == 16 * TRAIN_LENGTH
    size = np.sqrt((INSERTION**2).mean())
    for head, log_decay in zip(found["states"]["heads"], LOG_DECAY, strict=True):
        inside, beyond = (size * sums(np.array([n]), log_decay)[0] for n in (TRAIN_LENGTH, 16 * TRAIN_LENGTH))
        assert head["rms_inside"] == pytest.approx(inside, rel=1e-4)
        assert head["rms_beyond"] == pytest.approx(beyond, rel=1e-4)
        assert head["retention"] == pytest.approx(math.exp(log_decay * (TRAIN_LENGTH - 1)), rel=1e-4)
    numbers = json.loads((tmp_path / "out" / "result.json").read_text())["metrics"]
    assert numbers["states/rms_growth_max"] == pytest.approx(16, rel=0.01)
    assert numbers["states/retention_max"] == pytest.approx(1, abs=1e-3)
    assert numbers["states/rms_growth_median"] == pytest.approx((16 + 1) / 2, rel=0.01)
    assert "RMS grows up to 16.0" in capsys.readouterr().out.replace("15.99", "16.0")


def test_what_cannot_be_measured_is_refused_or_left_out(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"suites=.*choose from \[passkey, loss, states, "):
        parse(EvaluateConfig, [{"checkpoint": "x", "suites": ["state"]}])
    checkpoint = save_constructed(tmp_path / "model", "data.name=passkey", "data.train_length=128")
    arguments = [f"checkpoint={checkpoint}", f"run_dir={tmp_path}/out", "suites=[states]"]
    with pytest.raises(SystemExit):
        main([*arguments, "tracking.enabled=false", "states.length=128"])
    assert "states.length=128: must exceed the training length" in capsys.readouterr().err
    assert state_metrics(None) == {}

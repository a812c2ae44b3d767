"""The over-length probe at validation: what it logs, when it warns, and that it changes nothing else."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conf.load import parse
from conf.schema import TrainConfig
from data.tokenizers import ByteTokenizer
from lightning_modules.callbacks.probe import OverLengthProbe
from lightning_modules.checkpoints import load_model
from lightning_modules.language_model import LanguageModel
from tests.lightning_modules.constructed import (
    INSERTION,
    LOG_DECAY,
    constructed_config,
    constructed_model,
    newline_losses,
    sums,
)
from tests.lightning_modules.launcher import train

SMALL = [
    *("model.d_model=32", "model.n_layers=1", "model.d_state=16", "model.headdim=16", "model.chunk_size=32"),
    *("data.train_length=128", "data.batch_size=4", "data.val_sequences=4", "optim.warmup_steps=5"),
    *("trainer.max_steps=8", "trainer.threads=1", "trainer.val_every=4", "tracking.enabled=false"),
]
METRICS = ("collapse/position", "collapse/loss_ratio", "collapse/max_head_rms", "collapse/solved")


def test_its_numbers_reach_the_result_and_training_is_the_same(tmp_path: Path) -> None:
    for name, settings in (("plain", []), ("probed", ["probe.factor=4", "probe.prompts=2"])):
        argv = [*SMALL, *settings, f"run_dir={tmp_path / name}"]
        assert train(argv, tmp_path / "output.txt") == 0, (tmp_path / "output.txt").read_text()
    plain, probed = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("plain", "probed"))
    assert probed["metrics"]["collapse/position"] == 0  # eight steps have solved nothing
    assert probed["metrics"]["collapse/solved"] == 0
    assert probed["metrics"]["collapse/max_head_rms"] > 0
    assert set(probed["metrics"]) - set(plain["metrics"]) == set(METRICS)
    for name, value in load_model(tmp_path / "plain").state_dict().items():
        assert torch.equal(value, load_model(tmp_path / "probed").state_dict()[name]), name
    points = [json.loads(line) for line in (tmp_path / "probed" / "metrics.jsonl").read_text().splitlines()]
    assert [p["step"] for p in points if "collapse/position" in p["metrics"]] == [4, 8]
    assert "collapse/position" in (tmp_path / "output.txt").read_text()


def validate(callback: OverLengthProbe, module: LanguageModel, step: int) -> dict[str, Any]:
    trainer: Any = SimpleNamespace(
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
        datamodule=SimpleNamespace(tokenizer=ByteTokenizer()),
        default_root_dir="runs/x",
        global_step=step,
        is_global_zero=True,
    )
    module.val_metrics = {"val/loss": 1.0}
    callback.setup(trainer, module, "fit")
    callback.on_validation_end(trainer, module)
    return module.val_metrics


@pytest.fixture
def newlines(tmp_path: Path) -> list[str]:
    (tmp_path / "newlines.txt").write_text("\n" * 20_000)
    return [f"data.documents.source={tmp_path / 'newlines.txt'}", "data.documents.val_fraction=0.5"]


def test_logs_the_collapse_that_is_known_by_hand_and_warns_once(
    newlines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = constructed_config("probe.factor=8", "probe.prompts=2", *newlines)
    module = LanguageModel(config)
    module.model = constructed_model()
    callback = OverLengthProbe(config)
    metrics = validate(callback, module, step=30)
    losses = newline_losses(512).reshape(-1, 16).mean(1)
    assert metrics["val/loss"] == 1.0
    assert metrics["collapse/position"] == 65
    assert metrics["collapse/solved"] == 1
    assert metrics["collapse/loss_ratio"] == pytest.approx(losses[4:].max() / losses[:4].max(), rel=1e-3)
    rms = (INSERTION**2).mean() ** 0.5 * sums(512, LOG_DECAY[0])
    assert metrics["collapse/max_head_rms"] == pytest.approx(rms, rel=1e-4)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: step 30: collapse at 65 tokens by loss (trained at 64)")
    assert warning.count("\n") == 1

    validate(callback, module, step=40)
    assert capsys.readouterr().err == ""
    resumed = OverLengthProbe(config)
    resumed.load_state_dict(callback.state_dict())
    validate(resumed, module, step=50)
    assert capsys.readouterr().err == ""


def test_documents_that_are_too_short_are_refused_before_training(newlines: list[str]) -> None:
    config = constructed_config("probe.factor=800", *newlines)
    module = LanguageModel(config)
    with pytest.raises(ValueError, match=r"probe.factor \* data.train_length=51200.*only"):
        validate(OverLengthProbe(config), module, step=0)


@pytest.mark.parametrize("factor", [-1, 1])
def test_a_factor_that_looks_nowhere_is_refused(factor: int) -> None:
    with pytest.raises(ValueError, match=f"probe.factor={factor}: must be 0 for no probe, or at least 2"):
        parse(TrainConfig, [f"probe.factor={factor}"])

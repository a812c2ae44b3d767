"""The command and its file: made beside the checkpoint, taken by the commands, refused for another model."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conf.load import parse
from conf.mitigation import MitigationConfig
from conf.schema import DataConfig, DocumentsConfig, TrainConfig
from data.tokenizers import load_tokenizer
from lightning_modules.backbone import Mamba2LM
from lightning_modules.calibrate import main as calibrate
from lightning_modules.calibration.file import beside, read_calibration
from lightning_modules.checkpoints import save_model
from lightning_modules.evaluate import main as evaluate
from lightning_modules.evaluation.loss import held_out_documents
from lightning_modules.evaluation.splits import PARTS, draw_seed
from lightning_modules.mitigations import build_mitigation
from tests.lightning_modules.launcher import train

TINY = ("model.d_model=16", "model.d_state=8", "model.headdim=8", "model.chunk_size=16")
TRAINED = (*TINY, "data.train_length=128")
QUICK = ("sequences=2", "norms.stride=32", "search.evaluations=3", "search.length=150", "filter.longest=4")
READ = ("suites=[loss]", "loss.length=150", "loss.prompts=1", "tracking.enabled=false")
NAMES = ("state_norm", "token_filter", "delta_scale", "decay_scale")
EXTRA = {"state_norm": ("mitigation.every=16",)}


def save(folder: Path, seed: int = 0, *overrides: str) -> Path:
    config = parse(TrainConfig, [*TRAINED, *overrides])
    torch.manual_seed(seed)
    save_model(Mamba2LM(config.model), folder, config)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "model")


def options(name: str, calibration: object) -> list[str]:
    return [f"mitigation.name={name}", f"mitigation.calibration={calibration}", *EXTRA.get(name, ())]


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_small_says_how_it_was_made_and_serves_evaluate(
    name: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate([f"checkpoint={checkpoint}", f"mitigation.name={name}", "seed=5", *QUICK])
    path = checkpoint / f"calibration-{name}.json"
    assert capsys.readouterr().out.endswith(f"{path}\n")
    assert path.stat().st_size < 5000
    found = read_calibration(path, name)
    assert (found.mitigation, found.checkpoint, found.settings["seed"]) == (name, str(checkpoint), 5)
    assert found.settings["length"] == (150 if name.endswith("scale") else 128)
    config = parse(TrainConfig, [*TRAINED])
    settings = MitigationConfig(name=name, calibration=str(path), every=16 if name == "state_norm" else None)  # type: ignore[arg-type]
    rules = build_mitigation(settings, config.model, length=256)
    assert len(rules.layers) == config.model.n_layers
    run_dir = tmp_path / "out"
    evaluate([f"checkpoint={checkpoint}", f"run_dir={run_dir}", *READ, *options(name, path)])
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert evaluation["mitigation"]["calibration"] == str(path)
    assert all(value is not None for value in evaluation["loss"]["loss"])


def test_auto_makes_the_file_once_and_again_for_other_weights(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [f"checkpoint={checkpoint}", *READ, *options("state_norm", "auto")]
    evaluate([*command, f"run_dir={tmp_path / 'a'}"])
    path = beside(checkpoint, "state_norm")
    first = path.read_text()
    made = path.stat().st_mtime_ns
    evaluate([*command, f"run_dir={tmp_path / 'b'}"])
    assert path.stat().st_mtime_ns == made
    evaluate([*command, f"run_dir={tmp_path / 'a'}"])
    assert "holds this evaluation already" in capsys.readouterr().out
    save(checkpoint, seed=1)
    evaluate([*command, f"run_dir={tmp_path / 'c'}"])
    assert json.loads(path.read_text())["weights"] != json.loads(first)["weights"]


def test_a_result_belongs_to_what_the_file_says(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run directory answers for the same contents of the file, and refuses others."""
    path = tmp_path / "norms.json"
    make = [f"checkpoint={checkpoint}", "mitigation.name=state_norm", f"output={path}", *QUICK]
    calibrate(make)
    command = [f"checkpoint={checkpoint}", *READ, *options("state_norm", path), f"run_dir={tmp_path / 'a'}"]
    evaluate(command)
    calibrate([*make, "norms.quantile=0.5"])
    with pytest.raises(SystemExit):
        evaluate(command)
    assert "holds another evaluation" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_scale_multiplies_what_was_found(name: str, checkpoint: Path) -> None:
    calibrate([f"checkpoint={checkpoint}", f"mitigation.name={name}", *QUICK])
    path, model = str(beside(checkpoint, name)), parse(TrainConfig, [*TRAINED]).model
    every = 16 if name == "state_norm" else None
    setting = {"state_norm": "max_norm", "token_filter": "threshold"}.get(name, name)

    def values(scale: float) -> Any:
        config = MitigationConfig(name=name, calibration=path, every=every, calibration_scale=scale)  # type: ignore[arg-type]
        return getattr(build_mitigation(config, model, length=400).layers[0], setting)

    one, two = values(1.0), values(2.0)
    assert torch.equal(torch.as_tensor(two), 2 * torch.as_tensor(one))


def test_thresholds_are_for_the_length_of_the_prompt(checkpoint: Path) -> None:
    """None up to the training length; then rising; the setting comes before the prompt's own length."""
    calibrate([f"checkpoint={checkpoint}", "mitigation.name=token_filter", "filter.retention=1.0e-6", *QUICK])
    model = parse(TrainConfig, [*TRAINED]).model

    def thresholds(length: int | None, setting: int | None = None) -> torch.Tensor:
        path = str(beside(checkpoint, "token_filter"))
        config = MitigationConfig(name="token_filter", calibration=path, length=setting)
        found = build_mitigation(config, model, length=length).layers[0].threshold
        return torch.zeros(model.n_heads) if found is None else torch.as_tensor(found)

    assert not thresholds(100).any()
    assert not thresholds(128).any()
    low, middle, high = thresholds(200), thresholds(256), thresholds(10_000)
    assert ((low < middle) & (middle < high)).any()
    assert ((low <= middle) & (middle <= high)).all()
    assert torch.equal(thresholds(512), thresholds(128, setting=512))
    with pytest.raises(ValueError, match=r"mitigation.length=None: .* give their number"):
        thresholds(None)


def test_training_starts_from_the_calibrated_weights_and_is_measured_under_them(
    checkpoint: Path, tmp_path: Path
) -> None:
    calibrate([f"checkpoint={checkpoint}", "mitigation.name=state_norm", *QUICK])
    rule = options("state_norm", beside(checkpoint, "state_norm"))
    few = ("trainer.max_steps=2", "data.batch_size=2", "data.val_sequences=2", "tracking.enabled=false")
    argv = [*TRAINED, *few, *rule]
    other, output = save(tmp_path / "other", 1), tmp_path / "output.txt"
    assert train([*argv, f"init_from={other}", f"run_dir={tmp_path / 'no'}"], output) == 2
    assert "belongs to other weights" in output.read_text()
    run = tmp_path / "run"
    assert train([*argv, f"init_from={checkpoint}", f"run_dir={run}"], output) == 0, output.read_text()
    evaluate([f"checkpoint={run}", f"run_dir={tmp_path / 'out'}", *READ, *rule])
    assert (tmp_path / "out" / "result.json").is_file()


def test_every_mistake_is_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate([f"checkpoint={checkpoint}", "mitigation.name=state_norm", *QUICK])
    path = beside(checkpoint, "state_norm")
    other = save(tmp_path / "other", 1)
    wider = save(tmp_path / "wider", 0, "model.d_model=32")
    damaged = tmp_path / "damaged.json"
    damaged.write_text(path.read_text()[:100])
    run_dir = f"run_dir={tmp_path / 'out'}"
    mistakes = [
        (evaluate, [f"checkpoint={other}", *options("state_norm", path)], "belongs to other weights"),
        (evaluate, [f"checkpoint={wider}", *options("state_norm", path)], "of a model of 2 layers x 4 heads"),
        (evaluate, [f"checkpoint={checkpoint}", *options("decay_scale", path)], "of state_norm, not of"),
        (evaluate, [f"checkpoint={checkpoint}", *options("state_norm", damaged)], "or damaged"),
        (evaluate, [f"checkpoint={checkpoint}", *options("state_norm", "nowhere.json")], "cannot be read"),
        (calibrate, [f"checkpoint={checkpoint}", f"output={tmp_path}/no/where.json"], "is no folder"),
        (calibrate, ["checkpoint=nowhere"], "no such checkpoint"),
        (calibrate, [f"checkpoint={checkpoint}", "norms.quantile=1.5"], "norms.quantile=1.5: must lie in"),
        (calibrate, [f"checkpoint={checkpoint}", "mitigation.name=forget_more"], "forget_more"),
        (calibrate, [f"checkpoint={checkpoint}", "search.evaluations=2"], "search.evaluations=2: must be"),
    ]
    capsys.readouterr()
    for command, arguments, message in mistakes:
        own = [*READ, run_dir] if command is evaluate else []
        with pytest.raises(SystemExit) as stop:
            command([*arguments, *own])
        error = capsys.readouterr().err
        assert (stop.value.code, error.count("\n")) == (2, 1), error
        assert message in error
    assert not (tmp_path / "out").exists()


def test_splits_share_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from datasets import config as datasets_config

    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"Text number {i}. " * 20)
    documents = DocumentsConfig(source=str(tmp_path / "*.txt"), val_fraction=0.5)
    data = DataConfig(name="documents", documents=documents)
    streams = [held_out_documents(data, load_tokenizer("bytes"), split) for split in PARTS]
    borders = sorted((stream.start, stream.stop) for stream in streams)
    assert borders[0][0] == 0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(borders))
    assert all(len(stream) > 100 for stream in streams)
    assert draw_seed(1, "test") == 1
    assert len({draw_seed(seed, split) for seed in range(50) for split in PARTS}) == 150
    assert np.random.default_rng([1, draw_seed(3, "calibration")]).random() >= 0  # a seed that NumPy takes

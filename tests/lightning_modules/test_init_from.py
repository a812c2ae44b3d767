"""Training that starts from the weights of another run."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conf.load import parse
from conf.schema import TrainConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.checkpoints import checkpoint_path, list_checkpoints, load_model, save_model
from tests.lightning_modules.launcher import train
from tests.lightning_modules.test_resume import SETTINGS, assert_equal

FEW = [*SETTINGS, "tracking.enabled=false", "trainer.max_steps=8", "data.curriculum_steps=0"]
STILL = ["optim.lr=1e-30", "optim.weight_decay=0"]  # the step is below what fp32 can add


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("source") / "run"
    assert train([*FEW, f"run_dir={folder}"], folder.parent / "output.txt") == 0
    return folder


def weights(path: Path) -> dict[str, Tensor]:
    return load_model(path).state_dict()


@pytest.mark.parametrize("kind", ["run directory", "checkpoint", "saved directory"])
def test_a_run_starts_from_weights_and_a_new_schedule(source: Path, tmp_path: Path, kind: str) -> None:
    path = source
    if kind == "checkpoint":
        path = list_checkpoints(source / "checkpoints")[0]
    elif kind == "saved directory":
        path = tmp_path / "saved"
        save_model(load_model(source), path)
    argv = [
        *FEW,
        *STILL,
        f"init_from={path}",
        f"run_dir={tmp_path}/run",
        "initial_state.name=passed",
        "seed=1",
    ]
    output = tmp_path / "output.txt"
    assert train(argv, output) == 0, output.read_text()
    assert f"starting from the weights of {path}" in output.read_text()
    assert_equal(weights(tmp_path / "run"), weights(source), "weights")
    checkpoint = torch.load(list_checkpoints(tmp_path / "run" / "checkpoints")[0], weights_only=True)
    assert checkpoint["step"] == 8
    assert checkpoint["lr_schedulers"][0]["last_epoch"] == 8


def test_a_started_run_resumes_without_its_source(source: Path, tmp_path: Path) -> None:
    copy, whole, cut = tmp_path / "copy", tmp_path / "whole", tmp_path / "cut"
    shutil.copytree(source, copy)
    argv = [*FEW, f"init_from={copy}", "trainer.keep_last=9", "initial_state.name=passed"]
    assert train([*argv, f"run_dir={whole}"], tmp_path / "output.txt") == 0
    shutil.copytree(whole, cut)
    shutil.rmtree(copy)
    checkpoint_path(cut / "checkpoints", 8).unlink()
    (cut / "result.json").unlink()
    assert train([*argv, f"run_dir={cut}"], tmp_path / "output.txt") == 0
    assert "continuing from" in (tmp_path / "output.txt").read_text()
    assert_equal(weights(whole), weights(cut), "weights")
    assert any(
        not torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(source).values(), strict=True)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["init_from={source}", "model.d_state=8"], "has shape"),
        (["init_from={source}", "model.n_layers=3"], "has no parameter backbone.layers.2"),
        (["init_from={source}/none"], "none: no such checkpoint"),
    ],
    ids=["shape", "layers", "missing"],
)
def test_weights_that_do_not_fit_are_refused(
    source: Path, tmp_path: Path, settings: list[str], message: str
) -> None:
    output = tmp_path / "output.txt"
    argv = [*FEW, *(s.format(source=source) for s in settings), f"run_dir={tmp_path}/run"]
    assert train(argv, output) == 2
    (line,) = output.read_text().splitlines()
    assert line.startswith(f"error: init_from={source}")
    assert message in line


def test_the_shipped_continuation_fits_the_demo_model(tmp_path: Path) -> None:
    demo, argv = "conf/train/demo.yaml", ["conf/train/demo.yaml", "conf/train/continue-passed.yaml"]
    save_model(Mamba2LM(parse(TrainConfig, [demo]).model), tmp_path / "demo")
    short = ["trainer.max_steps=3", "data.val_sequences=4", "tracking.enabled=false", "trainer.threads=1"]
    argv += [*short, f"init_from={tmp_path}/demo", f"run_dir={tmp_path}/run"]
    assert train(argv, tmp_path / "output.txt") == 0, (tmp_path / "output.txt").read_text()
    saved = torch.load(list_checkpoints(tmp_path / "run" / "checkpoints")[0], weights_only=True)
    assert saved["initial_state"]["states"][1].any()

"""Models and training states on disk: whole or not at all, and read as data only."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.load import to_dict
from conf.schema import ModelConfig, TrainConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.checkpoints import (
    checkpoint_path,
    find_newest,
    link_last,
    list_checkpoints,
    load_config,
    load_model,
    prune,
    read_checkpoint,
    save_model,
    write_checkpoint,
)

CONFIG = TrainConfig(model=ModelConfig(d_model=32, headdim=16, d_state=16), seed=7)


def make_contents(config: TrainConfig = CONFIG, step: int = 1) -> dict[str, Any]:
    """What a training checkpoint holds, as far as a model is concerned."""
    model = Mamba2LM(config.model)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    return {"state_dict": state, "config": to_dict(config), "step": step}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_saved_model_computes_the_same(tmp_path: Path, tied: bool) -> None:
    model = Mamba2LM(ModelConfig(d_model=32, headdim=16, vocab_size=40, tie_embeddings=tied))
    save_model(model, tmp_path / "model")
    random = torch.get_rng_state()
    loaded = load_model(tmp_path / "model")
    assert torch.equal(random, torch.get_rng_state()), "loading drew random numbers"
    ids = torch.randint(40, (2, 33))
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert (loaded.lm_head.weight is loaded.backbone.embedding.weight) == tied
    assert loaded.config == model.config
    assert not loaded.training
    assert load_model(tmp_path / "model", dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


def test_all_three_kinds_of_path_load(tmp_path: Path) -> None:
    contents = make_contents()
    path = checkpoint_path(tmp_path / "run" / "checkpoints", 1)
    path.parent.mkdir(parents=True)
    write_checkpoint(contents, path)
    link_last(path.parent, path)
    save_model(load_model(path), tmp_path / "saved", CONFIG)
    for source in (path, path.parent / "last.ckpt", tmp_path / "run", tmp_path / "saved"):
        model = load_model(source)
        for name, value in model.state_dict().items():
            assert torch.equal(value, contents["state_dict"][f"model.{name}"]), (source, name)
        assert load_config(source) == CONFIG


def test_a_model_saved_alone_has_no_training_config(tmp_path: Path) -> None:
    save_model(Mamba2LM(CONFIG.model), tmp_path)
    with pytest.raises(ValueError, match="without its training config"):
        load_config(tmp_path)


def test_the_config_of_another_shape_is_named_by_parameter_and_shapes(tmp_path: Path) -> None:
    save_model(Mamba2LM(CONFIG.model), tmp_path, CONFIG)
    file = tmp_path / "config.yaml"
    file.write_text(file.read_text().replace("d_state: 16", "d_state: 32"))
    with pytest.raises(
        ValueError,
        match=r"\A.*layers.0.mixer.in_proj.weight has shape \(164, 32\).*asks for \(196, 32\)[^\n]*\Z",
    ):
        load_model(tmp_path)
    file.write_text(
        file.read_text().replace("d_state: 32", "d_state: 16").replace("n_layers: 2", "n_layers: 1")
    )
    with pytest.raises(ValueError, match=r"holds backbone.layers.1"):
        load_model(tmp_path)
    file.write_text(file.read_text().replace("n_layers: 1", "n_layers: 3"))
    with pytest.raises(ValueError, match=r"has no parameter backbone.layers.2"):
        load_model(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]*nothing.ckpt: no such checkpoint\Z"):
        load_model(tmp_path / "nothing.ckpt")
    with pytest.raises(ValueError, match=r"\A[^\n]*holds neither[^\n]*\Z"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\A[^\n]*no config.yaml[^\n]*\Z"):
        load_model(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_named_in_one_line(tmp_path: Path, share: float) -> None:
    path = tmp_path / "x.ckpt"
    write_checkpoint(make_contents(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"\A[^\n]*x.ckpt: truncated or damaged[^\n]*\Z"):
        load_model(path)


def test_a_truncated_saved_model_is_named_in_one_line(tmp_path: Path) -> None:
    save_model(Mamba2LM(CONFIG.model), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"\A[^\n]*model.safetensors: truncated or damaged[^\n]*\Z"):
        load_model(tmp_path)


class Malicious:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_a_checkpoint_is_data_and_never_code(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({**make_contents(), "extra": Malicious(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match=r"\A[^\n]*x.ckpt: truncated or damaged[^\n]*\Z"):
        load_model(path)
    assert not (tmp_path / "ran").exists()


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        load_model(tmp_path / "x.ckpt")


def test_the_newest_readable_checkpoint_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_newest(tmp_path) is None
    for step in (9, 10, 100):
        write_checkpoint(make_contents(step=step), checkpoint_path(tmp_path, step))
    checkpoint_path(tmp_path, 100).write_bytes(b"")
    found = find_newest(tmp_path)
    assert found is not None
    assert found[0] == checkpoint_path(tmp_path, 10)
    assert found[1]["step"] == 10
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.ckpt"
    write_checkpoint(make_contents(step=1), path)

    def fill_disk(contents: object, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fill_disk)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(make_contents(step=2), path)
    assert read_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_old_checkpoints_go_and_last_follows(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        path = checkpoint_path(tmp_path, step)
        write_checkpoint(make_contents(step=step), path)
        link_last(tmp_path, path)
        prune(tmp_path, keep=2)
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, 11), checkpoint_path(tmp_path, 10)]
    assert read_checkpoint(tmp_path / "last.ckpt")["step"] == 11

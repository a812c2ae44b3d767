"""A state on disk: what comes back is what was saved, for this model and mitigation alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conf.schema import ModelConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.generation.saved_state import load_state, save_state
from lightning_modules.mitigations import for_layers
from tests.lightning_modules.test_backbone_pieces import build
from tests.lightning_modules.test_generation_batch import CONFIG, MITIGATIONS


def read(model: Mamba2LM, mitigation: Any, rows: int = 2, length: int = 30) -> Any:
    ids = torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(3))
    return model.generate(ids, max_new_tokens=0, mitigation=mitigation).state


@pytest.fixture(scope="module")
def model() -> Mamba2LM:
    return build(CONFIG, seed=0).eval()


@pytest.mark.parametrize("name", MITIGATIONS)
def test_what_was_saved_comes_back(model: Mamba2LM, name: str, tmp_path: Path) -> None:
    mitigation, path = for_layers(MITIGATIONS[name], 2), tmp_path / "a.state"
    state = read(model, mitigation)
    save_state(path, state, model)
    loaded = load_state(path, model, mitigation, "cpu")
    assert loaded.mitigation == state.mitigation
    assert all(map(torch.equal, loaded.tensors(), state.tensors()))
    question = [[1, 2, 3], [4]]
    tokens = [
        model.generate(question, state=s, mitigation=mitigation, max_new_tokens=5).tokens
        for s in (state, loaded)
    ]
    assert tokens[0] == tokens[1]
    assert [file.name for file in tmp_path.iterdir()] == ["a.state"]


def test_the_header_names_model_mitigation_and_tokens(model: Mamba2LM, tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    save_state(path, read(model, MITIGATIONS["hard_reset"], rows=2, length=30), model)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert json.loads(header["tokens"]) == [30, 30]
    assert header["mitigation"] == "hard_reset(every=6)"
    assert len(header["model"]) == 64


def test_the_size_of_the_file_does_not_depend_on_what_was_read(model: Mamba2LM, tmp_path: Path) -> None:
    sizes = []
    for length in (1000, 9999):
        save_state(tmp_path / "a.state", read(model, None, length=length), model)
        sizes.append((tmp_path / "a.state").stat().st_size)
    assert abs(sizes[0] - sizes[1]) <= 8  # digits of the count


def test_chunk_size_changes_no_result_and_no_identity(model: Mamba2LM, tmp_path: Path) -> None:
    save_state(tmp_path / "a.state", read(model, None), model)
    same = build(ModelConfig(**{**vars(CONFIG), "chunk_size": 32}), seed=0)
    load_state(tmp_path / "a.state", same, for_layers(None, 2), "cpu")


def other_weights() -> Mamba2LM:
    return build(CONFIG, seed=1)


def other_config() -> Mamba2LM:
    return build(ModelConfig(**{**vars(CONFIG), "dt_limit": (0.0, 0.1)}), seed=0)


def other_dtype() -> Mamba2LM:
    return build(CONFIG, seed=0).bfloat16()


@pytest.mark.parametrize("other", [other_weights, other_config, other_dtype])
def test_another_model_is_refused(model: Mamba2LM, other: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    save_state(path, read(model, None), model)
    with pytest.raises(ValueError, match=rf"^state={path}: of another model[^\n]*$"):
        load_state(path, other(), for_layers(None, 2), "cpu")


def test_another_mitigation_is_refused(model: Mamba2LM, tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    save_state(path, read(model, None), model)
    with pytest.raises(ValueError, match=r"read under mitigation none, not sliding_window\(window=7\): "):
        load_state(path, model, for_layers(MITIGATIONS["sliding_window"], 2), "cpu")


def test_what_is_no_state_is_refused_in_a_line(model: Mamba2LM, tmp_path: Path) -> None:
    path, rules = tmp_path / "a.state", for_layers(None, 2)

    def refuse(message: str) -> None:
        with pytest.raises(ValueError, match=rf"^state={path}: {message}[^\n]*$"):
            load_state(path, model, rules, "cpu")

    refuse("no such file; make one with save_state=PATH")
    path.write_bytes(b"\x80\x04 pickled, perhaps")
    refuse("truncated or damaged")
    save_state(path, read(model, None), model)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    refuse("truncated or damaged")
    path.write_bytes(whole)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    save_file(tensors, path)
    refuse("no saved state of this version")
    del tensors["layer1.0"]
    save_file(tensors, path, metadata=header)
    refuse("damaged: its tensors are not those")

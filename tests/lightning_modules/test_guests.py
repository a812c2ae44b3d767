"""Recurrent models of other families: states that are values, decays as they are, the commands on them."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from lightning_modules.checkpoints import load_model
from lightning_modules.diagnose import main as diagnose
from lightning_modules.diagnosis.probe import StateProbe
from lightning_modules.evaluate import main as evaluate
from lightning_modules.guests.guest import Guest
from lightning_modules.guests.load import load_guest
from lightning_modules.guests.probe import GuestProbe
from tests.lightning_modules.layouts import CASES, config_of, write_hf
from tests.lightning_modules.test_evaluate_command import QUICK, UNTRACKED

VOCABULARY = 256
MAMBA = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": VOCABULARY}
QWEN = {
    **{"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": VOCABULARY, "intermediate_size": 32},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts": 0},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 4, "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 4, "mlp_only_layers": [0, 1, 2, 3]},
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "mamba": partial(transformers.MambaConfig, **MAMBA),
    "falcon_mamba": partial(transformers.FalconMambaConfig, **MAMBA),
    "mamba2": partial(
        transformers.Mamba2Config, **MAMBA, num_heads=4, head_dim=8, n_groups=2, chunk_size=16, use_bias=True
    ),
    "rwkv": partial(
        transformers.RwkvConfig, hidden_size=16, num_hidden_layers=2, vocab_size=VOCABULARY, rescale_every=1
    ),
    "qwen3_next": partial(transformers.Qwen3NextConfig, **QWEN),
}
LAYERS = {"qwen3_next": 3}  # the fourth is of attention
SHAPES = {  # heads, P, N
    "mamba": (32, 1, 4),
    "falcon_mamba": (32, 1, 4),
    "mamba2": (4, 8, 4),
    "rwkv": (16, 1, 2),
    "qwen3_next": (4, 8, 4),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random model of every family, as transformers saves it."""
    paths = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        paths[name] = tmp_path_factory.mktemp(name) / "model"
        model.save_pretrained(paths[name])
    return paths


@pytest.fixture(params=CONFIGS)
def guest(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Guest:
    return load_guest(folders[request.param])


def logits(guest: Guest, hidden: Tensor) -> Tensor:
    return guest.lm_head(hidden)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(VOCABULARY, (3, 41))


@torch.no_grad()
def test_pieces_give_what_the_whole_gives(guest: Guest, ids: Tensor, check_close: Any) -> None:
    """Their own logits, in one piece and in pieces of any length, single tokens of several rows included."""
    expected = guest.model(ids, use_cache=False).logits
    hidden, whole = guest.hidden(ids)
    check_close(logits(guest, hidden), expected, 1e-5, "in one piece")
    pieces, state = [], None
    for part in ids.split([7, 1, 1, 20, 12], 1):
        some, state = guest.hidden(part, state)
        pieces.append(some)
    assert state is not None
    check_close(logits(guest, torch.cat(pieces, 1)), expected, 1e-4, "in pieces")
    assert state.position.tolist() == [41, 41, 41]
    for layer, (a, b) in enumerate(zip(guest.states(state), guest.states(whole), strict=True)):
        check_close(a, b, 1e-4, f"layer {layer}")
    losses, _ = guest.token_losses(ids[:, :-1], ids[:, 1:])
    exact = torch.nn.functional.cross_entropy(expected[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    check_close(losses, exact, 1e-5, "losses")


@torch.no_grad()
def test_a_state_is_a_value(guest: Guest, ids: Tensor, check_close: Any) -> None:
    """Read on from twice, selected and repeated by rows: what was handed out never changes."""
    _, state = guest.hidden(ids[:, :20])
    kept = [t.clone() for layer in state.layers for t in layer]
    first, _ = guest.hidden(ids[:, 20:30], state)
    guest.hidden(ids[:, 5:6], state)
    again, _ = guest.hidden(ids[:, 20:30], state)
    assert torch.equal(first, again)
    assert all(
        torch.equal(a, b) for a, b in zip(kept, (t for layer in state.layers for t in layer), strict=True)
    )
    index = torch.tensor([2, 0, 2, 1])
    chosen, after = guest.hidden(ids[index, 20:30], state.rows(index))
    check_close(chosen, first[index], 1e-5, "rows")
    assert len(after.position) == 4


def test_shapes_and_names(guest: Guest, ids: Tensor) -> None:
    family = guest.config.family
    states = guest.states(guest.hidden(ids)[1])
    assert len(states) == guest.config.n_layers == len(guest.config.layer_names) == LAYERS.get(family, 2)
    for state in states:
        assert state.shape == (3, *SHAPES[family])
        assert state.dtype == torch.float32
    assert (guest.config.n_heads, guest.config.headdim, guest.config.d_state) == SHAPES[family]
    modules = dict(guest.model.named_modules())
    assert all(name in modules for name in guest.config.layer_names)


@torch.no_grad()
def test_the_probe_sees_what_becomes_of_a_state(folders: dict[str, Path], ids: Tensor) -> None:
    """Where the input writes nothing, the state decays by just the log decays that are seen."""
    for name in ("mamba", "falcon_mamba", "mamba2", "qwen3_next", "rwkv"):
        guest = load_guest(folders[name])
        _, start = guest.hidden(ids[:, :20])
        silence(guest)
        probe = GuestProbe(guest)
        with probe.attached():
            probe.stride = 7
            _, end = guest.hidden(ids[:, 20:34], start)
        values = probe.take()
        assert values["rms"].shape == (2, guest.config.n_layers, guest.config.n_heads)
        assert np.abs(values["insertion"][:, 0]).max() < 1e-6, name
        # log_decay: means over tokens, rows and N. Of the first layer, which alone was silenced.
        kept = (guest.states(end)[0] / guest.states(start)[0]).abs().log().mean((0, 2, 3)).numpy()
        seen = values["log_decay"][:, 0].sum(0) * 7
        slow = seen > -30  # of the others fp32 keeps nothing
        assert np.allclose(kept[slow], seen[slow], rtol=1e-3, atol=1e-4), name
        assert (kept[slow] < -0.05).sum() >= 3, name


def silence(guest: Guest) -> None:
    """Nothing is written from here on in the first layer."""
    layer: Any = guest.get_submodule(f"model.{guest.config.layer_names[0]}")
    if guest.config.family == "rwkv":
        # Weights are exp(key): none at all far below the exponent in force.
        layer.key.weight.zero_()
        layer.time_first.zero_()
        original = layer.key.forward
        layer.key.forward = lambda x: original(x) - 60.0
    elif guest.config.family == "qwen3_next":
        layer.conv1d.weight.zero_()
        layer.A_log.fill_(-3.0)  # slow enough for fp32
    else:
        layer.conv1d.weight.zero_()
        layer.conv1d.bias.zero_()


@torch.no_grad()
def test_mamba2_as_a_guest_measures_what_our_own_model_does(tmp_path: Path, ids: Tensor) -> None:
    """Every measure of every head at every stride, segment borders and single tokens between them."""
    write_hf(tmp_path / "hf", config_of({**CASES["groups"], "vocab_size": VOCABULARY}), torch.float32)
    ours, guest = load_model(tmp_path / "hf"), load_guest(tmp_path / "hf")
    taken = []
    for model, probe in ((ours, StateProbe(ours)), (guest, GuestProbe(guest))):
        with probe.attached():
            probe.stride, state = 5, None
            for part in ids.split([3, 1, 1, 25, 1, 4, 5, 1], 1):
                _, state = model.hidden(part, state)
            taken.append(probe.take())
    assert len(taken[0]["rms"]) == 8
    for name, values in taken[0].items():
        assert np.allclose(values, taken[1][name], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("name", ["mamba", "mamba2", "rwkv", "qwen3_next"])
def test_the_commands_take_a_guest(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name != "mamba":  # they take most of the time
        monkeypatch.setattr("lightning_modules.diagnosis.run.draw_figures", lambda *_: [])
    line = [f"checkpoint={folders[name]}", UNTRACKED, "data.tokenizer=bytes", "data.train_length=128"]
    line += ["data.name=passkey"]
    few = ["passkey.prompts=2", "passkey.depths=1", "suites=[passkey,loss,states]", "states.length=256"]
    evaluate([*line, *QUICK, *few, f"run_dir={tmp_path}/evaluated"])
    evaluation = json.loads((tmp_path / "evaluated" / "evaluation.json").read_text())
    assert evaluation["model"]["family"] == name
    assert [row["length"] for row in evaluation["passkey"]["recent"]] == [128, 256]
    assert None not in evaluation["loss"]["loss"]
    heads = LAYERS.get(name, 2) * SHAPES[name][0]
    assert len(evaluation["states"]["heads"]) == heads
    result = json.loads((tmp_path / "evaluated" / "result.json").read_text())
    assert result["metrics"]["memory/state_mib_per_sequence"] > 0
    diagnose(
        [
            *line,
            "length=256",
            "needle_prompts=2",
            "refine=0",
            "remembrance=0",
            f"run_dir={tmp_path}/diagnosed",
        ]
    )
    diagnosis = json.loads((tmp_path / "diagnosed" / "diagnosis.json").read_text())
    assert len(diagnosis["heads"]) == heads
    assert all(0 < row["decay"] <= 1 for row in diagnosis["heads"])
    assert diagnosis["model"]["layer_names"]
    assert (tmp_path / "diagnosed" / "diagnosis.html").is_file()


def test_what_a_guest_cannot_do_is_said(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [f"checkpoint={folders['rwkv']}", UNTRACKED, "data.tokenizer=bytes", "data.train_length=128"]

    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            evaluate(list(arguments))
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        return error

    assert "acts in our own scan" in refused(
        *line, "mitigation.name=forget_more", "mitigation.alpha_scale=0.9"
    )
    assert "acts in our own scan" in refused(*line, "mitigation.name=all")
    assert "data.train_length" in refused(*line[:3])
    # transformers would draw what is missing at random
    broken = tmp_path / "broken"
    broken.mkdir()
    from safetensors.torch import load_file, save_file

    weights = load_file(folders["rwkv"] / "model.safetensors")
    del weights["rwkv.blocks.1.attention.key.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    (broken / "config.json").write_text((folders["rwkv"] / "config.json").read_text())
    line[0] = f"checkpoint={broken}"
    assert "has no rwkv.blocks.1.attention.key.weight" in refused(*line, "data.name=passkey")
    (broken / "config.json").write_text('{"model_type": "llama"}')
    assert "model_type=llama" in refused(*line, "data.name=passkey")

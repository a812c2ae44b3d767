"""Recurrent models of other families: states that are values, decays as they are, the commands on them."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from conf.generate_schema import DecodingConfig
from lightning_modules.checkpoints import load_model
from lightning_modules.diagnose import main as diagnose
from lightning_modules.diagnosis.probe import StateProbe
from lightning_modules.evaluate import main as evaluate
from lightning_modules.generation.bench import GuestStep
from lightning_modules.generation.sampling import Sampler
from lightning_modules.generation_bench import main as generation_bench
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


VARIANTS: dict[str, Any] = {  # of the families: what a config can turn on and off
    "mamba": partial(
        transformers.MambaConfig, **MAMBA, use_bias=True, tie_word_embeddings=False, conv_kernel=3, expand=3
    ),
    "falcon_mamba": partial(
        transformers.FalconMambaConfig, **MAMBA, use_conv_bias=False, tie_word_embeddings=True
    ),
    "mamba2": partial(
        transformers.Mamba2Config,
        **MAMBA,
        **{"num_heads": 4, "head_dim": 8, "chunk_size": 16, "use_conv_bias": False, "n_groups": 1},
        time_step_limit=(0.02, 0.1),
    ),
    "rwkv": partial(
        transformers.RwkvConfig,
        **{"hidden_size": 16, "num_hidden_layers": 5, "vocab_size": VOCABULARY, "rescale_every": 2},
        tie_word_embeddings=True,
    ),
    "qwen3_next": partial(
        transformers.Qwen3NextConfig,
        **{
            **QWEN,
            "num_experts": 4,
            "mlp_only_layers": [],
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
        **{"shared_expert_intermediate_size": 16, "full_attention_interval": 2},
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_in_bfloat16_are_read_as_transformers_reads_them(
    name: str, tmp_path: Path, ids: Tensor, check_close: Any
) -> None:
    """Biases, ties, limits of dt, experts; weights in bfloat16, states and products in fp32."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(VARIANTS[name]()).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    guest = load_guest(tmp_path)
    assert guest.lm_head.weight.dtype == torch.float32
    assert torch.equal(guest.lm_head.weight, model.get_output_embeddings().weight.float())
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = theirs.eval()(ids, use_cache=False).logits
    hidden, whole = guest.hidden(ids)
    check_close(logits(guest, hidden), expected, 1e-5, "in one piece")
    for sizes in ([1] * 41, [1, 12, 1, 1, 26]):
        pieces, state = [], None
        for part in ids.split(sizes, 1):
            some, state = guest.hidden(part, state)
            pieces.append(some)
        check_close(logits(guest, torch.cat(pieces, 1)), expected, 1e-4, str(sizes))
        assert state is not None
        for layer, (a, b) in enumerate(zip(guest.states(state), guest.states(whole), strict=True)):
            check_close(a, b, 1e-4, f"layer {layer}")


def test_only_attention_grows(guest: Guest, ids: Tensor) -> None:
    layers, size = guest.growth()
    assert layers == ([3] if guest.config.family == "qwen3_next" else [])
    near, far = (guest.hidden(ids[:, :length])[1].nbytes for length in (10, 40))
    assert far - near == 30 * 3 * size


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


@pytest.mark.parametrize("name", CONFIGS)
def test_a_guest_in_the_bench(
    name: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [f"checkpoint={folders[name]}", "positions=[16,48]", "tokens=3", "rounds=2", "threads=1"]
    generation_bench([*line, "batch_size=2", f"output={tmp_path}/bench.json"])
    told = capsys.readouterr().out
    result = json.loads((tmp_path / "bench.json").read_text())
    near, far = result["positions"]
    assert (result["family"], result["step"]) == (name, "GuestStep")
    assert min(near["tokens_per_second"], far["tokens_per_second"]) > 0
    grown = 2 * 32 * result["growing_bytes_per_token"]
    assert far["state_bytes"] - near["state_bytes"] == grown
    assert (grown > 0) == (name == "qwen3_next") == ("in layers 3: they are of attention" in told)
    for setting, said in (
        ("dtype=bfloat16", "dtype=bfloat16: not of a guest"),
        ("cuda_graph=true", "cuda_graph=True: not of a guest"),
        ("mitigation.name=hard_reset mitigation.every=9", "mitigation.name=hard_reset: not of a guest"),
    ):
        with pytest.raises(SystemExit):
            generation_bench([*line, *setting.split()])
        error = capsys.readouterr().err
        assert error.startswith(f"error: {said}")
        assert error.count("\n") == 1


def test_a_guests_step_chooses_what_transformers_generates(folders: dict[str, Path], ids: Tensor) -> None:
    """Token by token from a state, as the bench times it."""
    for name, folder in folders.items():
        guest = load_guest(folder)
        step = GuestStep(guest, guest.hidden(ids[:, :-1])[1], Sampler(DecodingConfig(), VOCABULARY))
        tokens, made = ids[:, -1], []
        for _ in range(6):
            tokens = step(tokens, torch.ones(3, dtype=torch.bool), torch.zeros(3).double())
            made.append(tokens)
        whole = ids
        with torch.no_grad():
            for _ in range(6):
                whole = torch.cat([whole, guest.model(whole, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(torch.stack(made, 1), whole[:, -6:]), name


@pytest.mark.parametrize("name", CONFIGS)
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


def edited(folder: Path, target: Path, **settings: Any) -> Path:
    """A copy with other settings in its config."""
    shutil.copytree(folder, target)
    file = target / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return target


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another_family": (
        {"model_type": "llama"},
        "model_type=llama: neither Mamba-2 nor a guest known here: kn",
    ),
    "no_family": ({"model_type": ["mamba"]}, r"model_type=\['mamba'\]: neither Mamba-2 nor a guest"),
    "no_number": ({"hidden_size": "wide"}, "config.json: does not hold .*expected int, got str"),
    "no_layers": ({"num_hidden_layers": -1}, "config.json: does not hold "),
    "sizes": ({"state_size": 8}, r"A_log has shape \(32, 4\), its config asks for \(32, 8\)"),
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "cannot be loaded"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_config_is_one_line(
    settings: dict[str, Any],
    message: str,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = edited(folders["mamba"], tmp_path / "wrong", **settings)
    error = refused(capsys, path)
    assert re.search(message, error), error


def refused(capsys: pytest.CaptureFixture[str], path: Path, *further: str) -> str:
    line = [f"checkpoint={path}", UNTRACKED, "data.train_length=128", "data.name=passkey"]
    with pytest.raises(SystemExit):
        evaluate([*line, *(further or ("data.tokenizer=bytes",)), f"run_dir={path}-out"])
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    return error


def test_wrong_weights_are_one_line_and_no_code_runs(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = edited(folders["mamba"], tmp_path / "broken")
    file = path / "model.safetensors"
    weights = load_file(file)
    name = "backbone.layers.1.mixer.x_proj.weight"
    # transformers would draw what is missing at random
    save_file({k: v for k, v in weights.items() if k != name}, file, metadata={"format": "pt"})
    assert f"has no {name}: it is incomplete" in refused(capsys, path)
    save_file(weights | {"further": torch.zeros(2)}, file, metadata={"format": "pt"})
    assert "holds, without a place for it, further" in refused(capsys, path)
    save_file(weights | {name: torch.full_like(weights[name], torch.nan)}, file, metadata={"format": "pt"})
    assert f"{name} is not finite everywhere" in refused(capsys, path)
    assert "say what it was trained with, e.g. data.tokenizer=" in refused(capsys, path, "seed=1")
    file.write_bytes(file.read_bytes()[:500])
    assert "cannot be loaded" in refused(capsys, path)
    file.unlink()
    assert "cannot be loaded (Error no file named model.safetensors" in refused(capsys, path)
    torch.save({"x": Touch(tmp_path / "ran")}, path / "pytorch_model.bin")
    assert "holds more than tensors, which only running its code would read" in refused(capsys, path)
    (path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (path / "pytorch_model.bin").unlink()
    save_file(weights, file, metadata={"format": "pt"})
    remote = {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    assert load_guest(edited(path, tmp_path / "remote", **remote)).config.family == "mamba"
    assert "neither Mamba-2 nor a guest" in refused(
        capsys, edited(path, tmp_path / "other", model_type="own", **remote)
    )
    assert not (tmp_path / "ran").exists()


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_rwkv_fetches_no_kernel_and_says_what_it_cannot_carry(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where transformers sees a GPU it would run a compiled kernel of the hub."""
    from transformers.models.rwkv import modeling_rwkv

    fetched: list[int] = []
    monkeypatch.setattr(modeling_rwkv, "is_torch_cuda_available", lambda: True)
    monkeypatch.setattr(modeling_rwkv, "is_ninja_available", lambda: True)
    monkeypatch.setattr(modeling_rwkv, "load_wkv_cuda_kernel", fetched.append)
    load_guest(folders["rwkv"])
    assert fetched == []
    transformers.AutoModelForCausalLM.from_pretrained(folders["rwkv"])
    assert fetched, "or this test shows nothing"
    path = edited(folders["rwkv"], tmp_path / "wide", attention_hidden_size=24)
    with pytest.raises(ValueError, match=r"wide: attention_hidden_size=24: transformers carries states of"):
        load_guest(path)

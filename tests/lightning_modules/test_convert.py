"""Checkpoints between layouts: bit for bit, and the same model to whoever reads it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Mamba2ForCausalLM

from conf.conversion import ConvertConfig
from conf.load import to_dict
from conf.schema import ModelConfig, TrainConfig
from kernels.conv import causal_conv1d
from kernels.norm import gated_rms_norm
from kernels.ssd import ssd_scan
from lightning_modules.backbone import Mamba2LM
from lightning_modules.checkpoints import load_model, save_model, write_checkpoint
from lightning_modules.conversion.run import convert
from tests.lightning_modules.layouts import (
    CASES,
    DTYPES,
    config_of,
    require_equal,
    write_hf,
    write_state_spaces,
)


def run(source: Path, target: Path, layout: str = "ours", **settings: Any) -> dict[str, Any]:
    return convert(ConvertConfig(source=str(source), target=str(target), layout=layout, **settings))


def files_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor in a directory's safetensors."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


# Every shape in fp32, some in half precision.
PAIRS = {f"{name}-{dtype}": (CASES[name], dtype) for name in CASES for dtype in DTYPES[:1]}
PAIRS |= {f"{name}-{dtype}": (CASES[name], dtype) for name in ("groups", "untied") for dtype in DTYPES[1:]}


@pytest.mark.parametrize(("sizes", "dtype"), PAIRS.values(), ids=PAIRS.keys())
def test_transformers_to_ours_to_state_spaces_and_back(
    sizes: dict, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The logits are transformers' own (measured: 2e-6), and every weight comes back bit for bit."""
    config = config_of(sizes)
    write_hf(tmp_path / "theirs", config, dtype)
    report = run(tmp_path / "theirs", tmp_path / "ours")
    run(tmp_path / "ours", tmp_path / "ss", "state-spaces")
    back = run(tmp_path / "ss", tmp_path / "back", "hf")
    require_equal(files_of(tmp_path / "back"), files_of(tmp_path / "theirs"))
    assert report["sha256"] == back["sha256"]
    assert report["dtypes"] == [str(dtype)[6:]]
    for each in (report, back):
        (exact, theirs) = each["comparisons"]
        assert exact["max_difference"] == 0
        assert "Mamba2ForCausalLM" in theirs["second"]
        assert theirs["max_difference"] < 1e-4 * theirs["largest_logit"]
    # Not by our report alone: an independent reading of both ends.
    ids = torch.randint(48, (2, 70))
    with torch.no_grad():
        first, last = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
            for name in ("theirs", "back")
        )
        assert torch.equal(first(ids).logits, last(ids).logits)
        torch.testing.assert_close(
            load_model(tmp_path / "ours")(ids).logits, first(ids).logits, atol=1e-4, rtol=1e-4
        )
    assert tuple(last.config.time_step_limit) == tuple(first.config.time_step_limit)
    assert last.config.tie_word_embeddings == config.tie_embeddings
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").dtype == dtype


@pytest.mark.parametrize("layout", ["ours", "hf", "state-spaces"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_spaces_and_back(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The public layout name by name and byte by byte, the head in the file although it is tied."""
    for name in ("groups", "untied"):
        folder = tmp_path / name
        weights = write_state_spaces(folder / "theirs", config_of(CASES[name]), dtype)
        run(folder / "theirs", folder / "there", layout)
        run(folder / "there", folder / "back", "state-spaces")
        loaded = torch.load(folder / "back" / "pytorch_model.bin", weights_only=True)
        require_equal(loaded, weights)
        theirs, ours = (json.loads((folder / f / "config.json").read_text()) for f in ("theirs", "back"))
        assert {k: v for k, v in ours.items() if k != "ssm_cfg"} == {
            k: v for k, v in theirs.items() if k != "ssm_cfg"
        }
        kept = {**theirs["ssm_cfg"], **ours["ssm_cfg"]}
        assert kept == theirs["ssm_cfg"], "what is not a default is written, and nothing else"


def test_the_published_config_comes_back_as_it_was(tmp_path: Path) -> None:
    """A model of the public shape names nothing but its layer, as the public files do."""
    config = config_of({"d_model": 64, "headdim": 64, "d_state": 128, "chunk_size": 256, "n_layers": 1})
    write_state_spaces(tmp_path / "theirs", config, torch.float16, ssm_cfg={"layer": "Mamba2"})
    run(tmp_path / "theirs", tmp_path / "hf", "hf")
    run(tmp_path / "hf", tmp_path / "back", "state-spaces")
    theirs, ours = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("theirs", "back"))
    assert ours == theirs


@pytest.mark.parametrize("kind", ["safetensors", "shards", "bin_shards"])
def test_every_kind_of_weight_files_is_read(kind: str, tmp_path: Path) -> None:
    config = config_of(CASES["groups"])
    weights = write_state_spaces(tmp_path / "theirs", config, torch.float32)
    run(tmp_path / "theirs", tmp_path / "expected")
    (tmp_path / "theirs" / "pytorch_model.bin").unlink()
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file({k: v.clone() for k, v in weights.items()}, tmp_path / "theirs" / "model.safetensors")
    else:
        names = sorted(weights)
        halves = {"one": names[::2], "two": names[1::2]}
        end = "safetensors" if kind == "shards" else "bin"
        for part, chosen in halves.items():
            some = {name: weights[name].clone() for name in chosen}
            if end == "bin":
                torch.save(some, tmp_path / "theirs" / f"{part}.bin")
            else:
                from safetensors.torch import save_file

                save_file(some, tmp_path / "theirs" / f"{part}.safetensors")
        index = {"weight_map": {name: f"{part}.{end}" for part, chosen in halves.items() for name in chosen}}
        stem = "model.safetensors" if end == "safetensors" else "pytorch_model.bin"
        (tmp_path / "theirs" / f"{stem}.index.json").write_text(json.dumps(index))
    run(tmp_path / "theirs", tmp_path / "ours")
    require_equal(files_of(tmp_path / "ours"), files_of(tmp_path / "expected"))


def test_shards_are_written_and_read(tmp_path: Path) -> None:
    write_hf(tmp_path / "whole", config_of(CASES["deep"]), torch.float32)
    report = run(tmp_path / "whole", tmp_path / "split", "hf", max_shard_size="8KB")
    assert len(report["files"]) > 3
    assert all((tmp_path / "split" / file).stat().st_size < 10_000 for file in report["files"])
    require_equal(files_of(tmp_path / "split"), files_of(tmp_path / "whole"))
    run(tmp_path / "split", tmp_path / "again", "hf")
    assert [file.name for file in (tmp_path / "again").glob("*.safetensors")] == ["model.safetensors"]
    loaded = Mamba2ForCausalLM.from_pretrained(tmp_path / "split")
    require_equal(loaded.state_dict(), Mamba2ForCausalLM.from_pretrained(tmp_path / "whole").state_dict())


def test_dtypes_of_a_mixed_checkpoint_are_kept(tmp_path: Path) -> None:
    """A_log, D and dt_bias in fp32 beside bf16 matrices: nobody's cast may touch them."""
    weights = write_state_spaces(tmp_path / "theirs", config_of(CASES["untied"]), torch.bfloat16)
    for name in weights:
        if name.endswith(("A_log", ".D", "dt_bias")):
            weights[name] = torch.randn(weights[name].shape)
    torch.save(weights, tmp_path / "theirs" / "pytorch_model.bin")
    for layout in ("ours", "hf"):
        report = run(tmp_path / "theirs", tmp_path / layout, layout)
        assert report["dtypes"] == ["bfloat16", "float32"]
        run(tmp_path / layout, tmp_path / f"{layout}-back", "state-spaces")
        require_equal(
            torch.load(tmp_path / f"{layout}-back" / "pytorch_model.bin", weights_only=True), weights
        )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    mixer = loaded.backbone.layers[0].mixer
    assert torch.equal(mixer.A_log, weights["backbone.layers.0.mixer.A_log"]), "cast on loading"


ODD = {
    "norm_before_gate": {"norm_before_gate": True, "n_groups": 2},
    "d_by_channel": {"d_has_hdim": True, "n_groups": 1},
    "both": {"norm_before_gate": True, "d_has_hdim": True, "n_groups": 2, "tie_embeddings": False},
}


@pytest.mark.parametrize("sizes", ODD.values(), ids=ODD.keys())
def test_what_transformers_lacks_agrees_with_the_oracles(sizes: dict, tmp_path: Path) -> None:
    """Read by the float64 oracles of the operators straight from the state-spaces file."""
    config = config_of({"d_model": 32, "headdim": 8, "d_state": 12, **sizes})
    weights = write_state_spaces(tmp_path / "theirs", config, torch.float32)
    run(tmp_path / "theirs", tmp_path / "ours")
    ids = torch.randint(48, (2, 40))
    with torch.no_grad():
        expected = oracle_logits(weights, config, ids)
        for path in (tmp_path / "ours", tmp_path / "theirs"):
            actual = load_model(path)(ids).logits
            torch.testing.assert_close(actual.double(), expected, atol=1e-4, rtol=1e-4)
    run(tmp_path / "ours", tmp_path / "back", "state-spaces")
    require_equal(torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True), weights)
    with pytest.raises(
        ValueError, match=r"\Alayout=hf: transformers' Mamba2 has no field for model\.[^\n]*\Z"
    ):
        run(tmp_path / "ours", tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()


def oracle_logits(weights: dict[str, Tensor], c: ModelConfig, ids: Tensor) -> Tensor:
    """Mamba-2 in float64 from the operators' oracles."""
    w = {name: value.double() for name, value in weights.items()}
    hidden = w["backbone.embedding.weight"][ids]
    for i in range(c.n_layers):
        block = {k.removeprefix(f"backbone.layers.{i}."): v for k, v in w.items() if f"layers.{i}." in k}
        u = rms(hidden, block["norm.weight"])
        z, xBC, dt = (u @ block["mixer.in_proj.weight"].T).split([c.d_inner, c.conv_dim, c.n_heads], -1)
        xBC, _ = causal_conv1d(
            xBC, block["mixer.conv1d.weight"].squeeze(1), block["mixer.conv1d.bias"], backend="naive"
        )
        x, B, C = xBC.split([c.d_inner, c.n_groups * c.d_state, c.n_groups * c.d_state], -1)
        D = block["mixer.D"]
        y, _ = ssd_scan(
            x.unflatten(-1, (c.n_heads, c.headdim)),
            dt,
            -block["mixer.A_log"].exp(),
            B.unflatten(-1, (c.n_groups, c.d_state)),
            C.unflatten(-1, (c.n_groups, c.d_state)),
            D=D.view(c.n_heads, -1) if c.d_has_hdim else D,
            dt_bias=block["mixer.dt_bias"],
            dt_softplus=True,
            backend="naive",
        )
        gated = gated_rms_norm(
            y.flatten(2).double(),
            z,
            block["mixer.norm.weight"],
            eps=1e-5,
            n_groups=c.n_groups,
            norm_before_gate=c.norm_before_gate,
            backend="naive",
        )
        hidden = hidden + gated.double() @ block["mixer.out_proj.weight"].T
    return rms(hidden, w["backbone.norm_f.weight"]) @ w["lm_head.weight"].T


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def test_our_checkpoints_and_consolidated_weights(tmp_path: Path) -> None:
    """A run directory, its .ckpt, a saved directory, and zero_to_fp32.py's output: one model."""
    config = TrainConfig(model=config_of({"vocab_size": 256, **CASES["groups"]}), seed=3)
    model = Mamba2LM(config.model)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    file = run_dir / "checkpoints" / "step=0000009.ckpt"
    write_checkpoint({"state_dict": state, "config": to_dict(config), "step": 9}, file)
    save_model(model, tmp_path / "saved", config)
    (run_dir / "config.yaml").write_text((tmp_path / "saved" / "config.yaml").read_text())
    consolidated = run_dir / "checkpoints" / "consolidated"
    consolidated.mkdir()
    names = [name for name in state if name != "model.lm_head.weight"]  # tied weights are saved once
    torch.save(
        {f"_forward_module.{n}": state[n] for n in names[:7]},
        consolidated / "pytorch_model-00001-of-00002.bin",
    )
    torch.save(
        {f"_forward_module.{n}": state[n] for n in names[7:]},
        consolidated / "pytorch_model-00002-of-00002.bin",
    )
    parts = {
        f"_forward_module.{n}": f"pytorch_model-0000{1 + (i >= 7)}-of-00002.bin" for i, n in enumerate(names)
    }
    (consolidated / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": parts}))
    torch.save({f"module.{n}": state[n] for n in names}, run_dir / "checkpoints" / "fp32.pt")
    sources = [run_dir, file, tmp_path / "saved", consolidated, run_dir / "checkpoints" / "fp32.pt"]
    sums = {run(source, tmp_path / f"to-{i}", "hf")["sha256"] for i, source in enumerate(sources)}
    assert len(sums) == 1
    (run_dir / "raw" / "global_step9").mkdir(parents=True)
    (run_dir / "raw" / "global_step9" / "mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"python zero_to_fp32\.py"):
        run(run_dir / "raw", tmp_path / "never")
    report = run(run_dir, tmp_path / "ours")
    assert report["source_layout"] == "ours"
    assert load_model(tmp_path / "ours").config == config.model
    from lightning_modules.checkpoints import load_config

    assert load_config(tmp_path / "ours") == replace(config, run_dir=None)

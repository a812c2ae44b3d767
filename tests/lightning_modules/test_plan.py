"""The planner's counts against the model itself, and its predictions against three steps."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conf.load import parse
from conf.plan_schema import PlanConfig
from conf.schema import ModelConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.layer import Mamba2
from lightning_modules.plan import DEVICES, main
from lightning_modules.planning import sizes
from lightning_modules.planning.estimate import advice, estimate, longest_segment
from lightning_modules.state import ModelState

ROOT = Path(__file__).parents[2]
SMALL = ModelConfig(d_model=128, n_layers=1, d_state=64, headdim=32)
MODELS = [
    SMALL,
    ModelConfig(d_model=64, n_layers=3, d_state=16, headdim=16, vocab_size=300, tie_embeddings=False),
    ModelConfig(d_model=96, n_layers=2, d_state=32, headdim=32, n_groups=2, d_has_hdim=True, d_conv=3),
]
LONG = [
    "conf/train/mamba2-370m.yaml",
    "data.train_length=1048576",
    "data.batch_size=1",
    "trainer.accumulate=1",
]


@pytest.mark.parametrize("config", MODELS)
def test_parameters_and_states_are_counted_right(config: ModelConfig) -> None:
    model = Mamba2LM(config)
    assert sizes.parameters(config) == sum(p.numel() for p in model.parameters())
    from kernels.ssd import Mitigation

    assert (
        sizes.state_bytes(config, 4) == ModelState.zeros(config, 1, "cpu", torch.float32, Mitigation()).nbytes
    )


def saved_bytes(config: ModelConfig, length: int, bf16: bool) -> int:
    """What a forward pass keeps for the backward, parameters aside."""
    model = Mamba2LM(config)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    ids = torch.randint(config.vocab_size, (1, length + 1))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses, _ = model.token_losses(ids[:, :-1], ids[:, 1:])
    assert losses.requires_grad
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_what_a_token_leaves_is_counted_right(bf16: bool, layers: int) -> None:
    config = replace(SMALL, n_layers=layers)
    measured = (saved_bytes(config, 1024, bf16) - saved_bytes(config, 512, bf16)) / 512
    counted = sizes.saved_per_token(config, 2 if bf16 else 4, on_gpu=False)
    assert counted == pytest.approx(measured, rel=0.01)


def test_what_the_fused_layer_leaves_is_counted_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, in Triton's interpreter."""
    monkeypatch.setattr(Mamba2, "_fuses", lambda *_: True)
    measured = (saved_bytes(SMALL, 192, bf16=False) - saved_bytes(SMALL, 128, bf16=False)) / 64
    assert sizes.saved_per_token(SMALL, 4, on_gpu=True, fused=True) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(
    "settings",
    [
        ["data.train_length=12288", "data.batch_size=1", "trainer.segment_length=6144", "model.n_layers=3"],
        pytest.param(
            ["data.train_length=8192", "data.batch_size=1", "model.n_layers=3"], marks=pytest.mark.slow
        ),
    ],
)
def test_the_prediction_holds_within_a_tenth(settings: list[str]) -> None:
    command = [sys.executable, "-m", "lightning_modules.plan", "conf/train/demo.yaml", "measure=true"]
    settings = [*settings, "data.curriculum_steps=0", "trainer.threads=1"]
    done = subprocess.run([*command, *settings], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.search(r"predicted over measured\W+([\d.]+)", done.stdout)
    assert found, done.stdout
    assert float(found[1]) == pytest.approx(1.0, abs=0.1), done.stdout


def test_what_cannot_fit_is_refused_with_the_setting_that_would(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*LONG, "device=h200"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: device=NVIDIA H200: needs ")
    assert error.count("\n") == 1
    found = re.search(r"trainer.segment_length=(\d+)", error)
    assert found
    assert main([*LONG, "device=h200", f"trainer.segment_length={found[1]}"]) == 0
    with pytest.raises(SystemExit):
        main([*LONG, "device=h200", f"trainer.segment_length={2 * int(found[1])}"])


def test_a_model_too_large_for_a_device_is_to_be_sharded() -> None:
    config = parse(PlanConfig, [*LONG, "model.d_model=8192", "model.n_layers=64"])
    device = DEVICES["h100"]
    assert longest_segment(config, device) is None
    assert "ZeRO" in advice(config, device)[0]


def test_what_several_devices_hold() -> None:
    rows = ["conf/train/mamba2-2.7b.yaml", "trainer.devices=8", "trainer.accumulate=8"]
    alone, device = parse(PlanConfig, rows), DEVICES["h200"]
    zero = parse(PlanConfig, [*rows, "trainer.strategy=deepspeed", "deepspeed.stage=2"])
    whole, shared = estimate(alone, device), estimate(zero, device)
    assert shared.parameters == whole.parameters
    assert shared.gradients == whole.gradients // 8
    assert shared.optimizer == whole.optimizer // 8
    pieces = parse(PlanConfig, [*rows, "trainer.context_parallel=8", "trainer.accumulate=64"])
    eighth = estimate(pieces, device).activations  # and a slab
    assert eighth == pytest.approx(whole.activations / 8, rel=0.05)
    tight = parse(PlanConfig, [*rows, "trainer.segment_length=512"])
    assert advice(tight, replace(device, memory=40 * 2**30))[0].startswith("trainer.strategy=deepspeed")


def test_longer_rows_take_no_more_than_their_states() -> None:
    config = parse(PlanConfig, [*LONG, "trainer.segment_length=16384", "trainer.cuda_graphs=false"])
    device = DEVICES["h200"]
    long, short = (
        estimate(replace(config, data=replace(config.data, train_length=length)), device)
        for length in (2**20, 2**17)
    )
    assert long.activations == short.activations
    assert long.peak - short.peak == long.borders - short.borders + long.tokens - short.tokens


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("device=b9000", "device"),
        ("memory_gib=0", "memory_gib=0.0: must be above 0"),
        ("trainer.truncate_after=2", "trainer.truncate_after=2: counts segments"),
    ],
)
def test_bad_input_is_one_line(argument: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["conf/train/demo.yaml", argument])
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1

"""What training logs besides its loss: gradient norms by group, MFU, memory, the place in the data."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conf.load import parse
from conf.schema import ModelConfig, TrainConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.callbacks.metrics import LogMetrics
from lightning_modules.gradient_norms import GROUPS, group_of, norms_by_group
from lightning_modules.planning import peaks, sizes
from lightning_modules.planning.peaks import model_flops_utilisation, peak_of
from tests.lightning_modules.launcher import train
from tests.lightning_modules.test_ranks import SETTINGS, metrics

CONFIG = ModelConfig(d_model=32, n_layers=2, d_state=8, headdim=16, vocab_size=40, tie_embeddings=False)


def by_group(record: dict[str, float]) -> dict[str, float]:
    prefix = "grad_norm/"
    return {name.removeprefix(prefix): v for name, v in record.items() if name.startswith(prefix)}


def test_every_parameter_has_its_group() -> None:
    names = [name for name, _ in Mamba2LM(CONFIG).named_parameters()]
    layer = "backbone.layers.1."
    expected = {
        "backbone.embedding.weight": "embedding",
        f"{layer}norm.weight": "norms",
        f"{layer}mixer.norm.weight": "norms",
        f"{layer}mixer.in_proj.weight": "in_proj",
        f"{layer}mixer.conv1d.weight": "conv1d",
        f"{layer}mixer.conv1d.bias": "conv1d",
        f"{layer}mixer.A_log": "recurrence",
        f"{layer}mixer.D": "recurrence",
        f"{layer}mixer.dt_bias": "recurrence",
        f"{layer}mixer.out_proj.weight": "out_proj",
        "backbone.norm_f.weight": "norms",
        "lm_head.weight": "head",
    }
    assert {name: group_of(name) for name in expected} == expected
    assert {group_of(name) for name in names} == set(GROUPS)
    assert set(expected) == {name for name in names if "layers.0" not in name}


def test_norms_are_those_of_the_concatenated_gradients() -> None:
    torch.manual_seed(0)
    gradients = [(name, torch.randn_like(p)) for name, p in Mamba2LM(CONFIG).named_parameters()]
    norms = norms_by_group(gradients)
    assert tuple(norms) == GROUPS
    for group, norm in norms.items():
        whole = torch.cat([g.flatten() for name, g in gradients if group_of(name) == group])
        assert norm == pytest.approx(whole.norm().item(), rel=1e-6)
    # Two ranks with a share each, one of them without any of some parameters.
    halves = [[], []]  # type: list[list[tuple[str, torch.Tensor]]]
    for index, (name, gradient) in enumerate(gradients):
        cut = gradient.numel() // 3 if index % 2 else gradient.numel()
        halves[0].append((name, gradient.flatten()[:cut]))
        halves[1].append((name, gradient.flatten()[cut:]))
    squares: list[torch.Tensor] = []
    norms_by_group(halves[1], lambda own: squares.append(own) or own)
    assert norms_by_group(halves[0], lambda own: own + squares[0]) == pytest.approx(norms, rel=1e-6)


def test_a_run_logs_where_it_stands_and_what_its_gradients_are(tmp_path: Path) -> None:
    """Norms before clipping; rows of documents that follow each other; nothing of a GPU on a CPU."""
    argv = [*SETTINGS, "optim.grad_clip=0.01", "trainer.log_every=2", "trainer.max_steps=5"]
    run_dir = tmp_path / "run"
    assert train([*argv, f"run_dir={run_dir}"], tmp_path / "output.txt") == 0
    records = [record for record in metrics(run_dir) if "train/loss" in record]
    assert [record["data/sample"] for record in records] == [16, 32, 40]  # steps 2, 4 and the last
    epochs = [record["data/epoch"] for record in records]
    assert epochs == pytest.approx([epochs[0], 2 * epochs[0], 2.5 * epochs[0]])
    # The same reader: 2 steps of 48 tokens further, in the same document unless that has ended.
    places = [(record["data/document"], record["data/document_token"]) for record in records]
    for (before, token), (document, after), steps in zip(places, places[1:], (2, 1), strict=False):
        assert after == token + 48 * steps if document == before else after < 48 * steps
    for record in records:
        norms = by_group(record)
        assert set(norms) == set(GROUPS) - {"head"}  # tied to the embedding
        assert math.hypot(*norms.values()) == pytest.approx(record["train/grad_norm"], rel=1e-5)
        assert record["train/grad_norm"] > 0.01
        assert "train/mfu" not in record
    text = (run_dir / "metrics.jsonl").read_text()
    assert "train/peak_memory_mib" in text
    assert "train/tokens_per_second" in text


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16-mixed", 989e12),
        ("NVIDIA GH200 480GB", "bf16-mixed", 989e12),
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989e12),
        ("NVIDIA H100 PCIe", "bf16-mixed", 756e12),
        ("NVIDIA H100 80GB HBM3", "32-true", 67e12),
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", 312e12),
        ("NVIDIA GeForce RTX 4090", "bf16-mixed", None),
    ],
)
def test_peaks_are_those_of_known_devices(name: str, precision: str, peak: float | None) -> None:
    assert peak_of(name, precision) == peak


def test_fp32_products_may_be_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks.torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_of("NVIDIA H200", "32-true") == 494e12


def test_mfu_is_of_all_devices_and_without_recomputation() -> None:
    argv = ["trainer.devices=4", "trainer.segment_length=64", "trainer.precision=bf16-mixed"]
    config = parse(TrainConfig, argv)
    flops = sizes.flops_per_token(config.model)
    peak = 1e12
    speed = 4 * peak / (3 * flops)  # nothing but the model's FLOPs, at full rate
    assert model_flops_utilisation(config, speed, peak) == pytest.approx(1.0)
    logged: Any = LogMetrics(config, SimpleNamespace())  # type: ignore[arg-type]
    assert logged.utilisation("train/mfu", speed) == {}
    logged.peak_flops = peak
    assert logged.utilisation("train/mfu", speed / 2) == {"train/mfu": pytest.approx(0.5)}

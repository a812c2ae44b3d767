"""What the recurrence needs in fp32 is seen to be fp32 before training, under every strategy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from conf.schema import ModelConfig
from kernels.context import Context
from kernels.ssd import Mitigation
from lightning_modules import dtypes
from lightning_modules.backbone import Mamba2LM
from lightning_modules.dtypes import recurrence_dtypes, require_fp32
from lightning_modules.run_dir import RunError
from tests.lightning_modules.launcher import call_on_ranks, train, train_on_ranks
from tests.lightning_modules.test_ranks import SETTINGS

CONFIG = ModelConfig(d_model=32, n_layers=2, d_state=8, headdim=16, vocab_size=40, chunk_size=16)
RULES = [Mitigation(), Mitigation("sliding_window", window=5)]
BF16 = torch.autocast("cpu", torch.bfloat16)


def seen(model: Mamba2LM, rule: Mitigation | None = None) -> str:
    with BF16:
        return require_fp32(recurrence_dtypes(model, rule or Mitigation()))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_under_autocast_products_are_bf16_and_the_recurrence_fp32(rule: Mitigation) -> None:
    model = Mamba2LM(CONFIG)
    told = seen(model, rule)
    assert told == "A, D, dt_bias, decays, states float32; x, B, C bfloat16"
    assert require_fp32(recurrence_dtypes(model, rule)) == ("A, D, dt_bias, decays, states, x, B, C float32")
    assert all(layer.mixer.scan is None for layer in model.backbone.layers)  # type: ignore[union-attr]
    model(torch.zeros(1, 4, dtype=torch.int64)).logits.sum().backward()  # nothing was left without a gradient
    assert all(parameter.grad is not None for parameter in model.parameters())


def bf16_bias(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.backbone.layers[1].mixer.dt_bias.data = model.backbone.layers[1].mixer.dt_bias.data.bfloat16()


def bf16_states(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = dtypes.ssd_scan

    def rounds(*arguments: Any, **options: Any) -> Any:
        y, state = scan(*arguments, **options)
        return y, state.bfloat16()

    monkeypatch.setattr(dtypes, "ssd_scan", rounds)


def bf16_decays(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    discretize = dtypes.discretize

    def rounds(*arguments: Any) -> Any:
        log_decay, insert = discretize(*arguments)
        return log_decay.bfloat16(), insert

    monkeypatch.setattr(dtypes, "discretize", rounds)


@pytest.mark.parametrize(
    ("spoil", "blamed"),
    [
        (bf16_bias, "layer 1: dt_bias in bfloat16: must be float32"),
        (bf16_states, "layer 0: states in bfloat16: must be float32"),
        (bf16_decays, "layer 0: decays in bfloat16: must be float32"),
    ],
)
def test_what_is_not_fp32_is_named(
    spoil: Callable[[Any, pytest.MonkeyPatch], None], blamed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Mamba2LM(CONFIG)
    spoil(model, monkeypatch)
    with pytest.raises(RunError, match=blamed):
        seen(model)


def check_sharded() -> None:
    context, model = Context(dist.group.WORLD), Mamba2LM(CONFIG)
    with BF16:
        found = recurrence_dtypes(model, Mitigation(), context)
        assert "states float32" in require_fp32(found)
        scan = context.ssd_scan

        def rounds(*arguments: Any, **options: Any) -> Any:
            y, state = scan(*arguments, **options)
            return y, state.bfloat16()

        context.ssd_scan = rounds  # type: ignore[method-assign]
        with pytest.raises(RunError, match="layer 0: states in bfloat16"):
            require_fp32(recurrence_dtypes(model, Mitigation(), context))


def test_states_of_a_sharded_sequence_are_looked_at_too(tmp_path: Path) -> None:
    call_on_ranks(2, check_sharded, output=tmp_path / "output.txt")


ONE_STEP = [*SETTINGS, "trainer.precision=bf16-mixed", "trainer.max_steps=1", "optim.warmup_steps=0"]
TOLD = "A, D, dt_bias, decays, states float32; x, B, C bfloat16"


@pytest.mark.parametrize(
    ("ranks", "argv"),
    [
        pytest.param(1, [], marks=pytest.mark.slow),
        pytest.param(2, ["trainer.strategy=ddp", "trainer.context_parallel=2"], marks=pytest.mark.slow),
        (2, ["trainer.strategy=deepspeed", "deepspeed.stage=3", "trainer.context_parallel=2"]),
        pytest.param(2, ["trainer.strategy=deepspeed", "deepspeed.stage=1"], marks=pytest.mark.slow),
        pytest.param(2, ["trainer.strategy=deepspeed", "deepspeed.stage=2"], marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)
def test_every_strategy_looks_and_tells(tmp_path: Path, ranks: int, argv: list[str]) -> None:
    output = tmp_path / "output.txt"
    argv = [*ONE_STEP, *argv, f"run_dir={tmp_path}/run"]
    if ranks == 1:
        assert train(argv, output) == 0, output.read_text()
    else:
        assert train_on_ranks(ranks, argv, output) == [0] * ranks, output.read_text()
    assert output.read_text().count(TOLD) == 1, output.read_text()

"""Where training rows begin: noise, fitted noise, states passed on."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.initial_state import InitialStateConfig
from conf.schema import DataConfig, OptimConfig, TrainConfig, TrainerConfig
from lightning_modules.initial_state import FittedNoise, InitialState, Passed, Rows
from lightning_modules.language_model import LanguageModel
from lightning_modules.run_dir import RunError
from lightning_modules.state import LayerState, ModelState
from lightning_modules.step_rows import gather_rows, own_rows
from tests.lightning_modules.test_train_step import MODEL, Batch, make_batch, pytestmark, run_step

__all__ = ["pytestmark"]
LAYERS, HEADS = MODEL.n_layers, MODEL.n_heads
BATCH = {"ids": torch.zeros(64, 1, dtype=torch.int64)}
ROWS = Rows(step=3, part=0, first=0, count=64)
ONE_PROCESS: Any = SimpleNamespace(world_size=1, global_rank=0, accumulate_grad_batches=1, global_step=3)


def make_config(*, steps: int = 1, accumulate: int = 1, **initial_state: Any) -> TrainConfig:
    """Weights stay as they are: the step is below what fp32 can add."""
    return TrainConfig(
        model=MODEL,
        data=DataConfig(name="documents", batch_size=8, train_length=24),
        optim=OptimConfig(grad_clip=0, lr=1e-30, weight_decay=0),
        trainer=TrainerConfig(max_steps=steps, accumulate=accumulate),
        initial_state=InitialStateConfig(**initial_state),
    )


def make(config: TrainConfig) -> Any:
    return LanguageModel(config).initial_state


def ssm(state: ModelState | None) -> Tensor:
    """(layers, B, H, P, N)"""
    assert state is not None
    return torch.stack([layer.ssm for layer in state.layers])  # type: ignore[misc]


def random_state(rows: int, mean: Tensor, std: Tensor) -> ModelState:
    """mean, std: (layers, heads)."""
    zero = InitialState(make_config(), LanguageModel(make_config()).mitigation).zeros(rows, "cpu")
    layers = [
        LayerState(
            conv=torch.randn_like(layer.conv),
            ssm=m[:, None, None] + s[:, None, None] * torch.randn(rows, HEADS, MODEL.headdim, MODEL.d_state),
        )
        for layer, m, s in zip(zero.layers, mean, std, strict=True)
    ]
    return ModelState(tuple(layers), torch.arange(rows) + 1)


def assert_only_ssm(state: ModelState) -> None:
    assert not any(layer.conv.any() for layer in state.layers)
    assert not state.position.any()


def test_noise_has_the_given_moments() -> None:
    state = make(make_config(name="noise", std=0.3)).begin(None, BATCH, ROWS)
    assert_only_ssm(state)
    values = ssm(state)
    assert values.shape == (LAYERS, 64, HEADS, MODEL.headdim, MODEL.d_state)
    n = values[0, :, 0].numel()
    for head in values.transpose(1, 2).flatten(0, 1):
        assert abs(head.mean().item()) < 5 * 0.3 / n**0.5
        assert head.std().item() == pytest.approx(0.3, rel=5 / (2 * n) ** 0.5)
    kurtosis = (values / 0.3).pow(4).mean().item()
    assert kurtosis == pytest.approx(3, rel=0.02)
    # No two rows, layers or heads are alike.
    flat = values.flatten(0, 2)[:, 0, 0]
    assert flat.unique().numel() == flat.numel()


def test_noise_depends_on_seed_step_and_row_alone() -> None:
    config = make_config(name="noise", std=1.0)
    whole = ssm(make(config).begin(None, BATCH, ROWS))
    torch.rand(7)
    half = {"ids": BATCH["ids"][:32]}
    later = ssm(make(config).begin(None, half, Rows(step=3, part=1, first=32, count=32)))
    assert torch.equal(later, whole[:, 32:])
    assert not torch.equal(ssm(make(config).begin(None, BATCH, Rows(4, 0, 0, 64))), whole)
    config.seed = 1
    assert not torch.equal(ssm(make(config).begin(None, BATCH, ROWS)), whole)


def test_fitted_noise_has_the_moments_of_the_final_states() -> None:
    fitted: FittedNoise = make(make_config(name="fitted_noise"))
    assert fitted.begin(None, BATCH, ROWS) is None  # type: ignore[arg-type]
    mean, std = torch.randn(LAYERS, HEADS), torch.rand(LAYERS, HEADS) + 0.1
    finals = [random_state(16, mean, std) for _ in range(2)]
    for part, final in enumerate(finals):
        fitted.end({}, Rows(0, part, 16 * part, 16), final)
    fitted.end_step(ONE_PROCESS)
    seen = torch.cat([ssm(final) for final in finals], 1).double()
    expected_mean, expected_std = seen.mean((1, 3, 4)), seen.std((1, 3, 4), correction=0)
    moments = fitted.moments(torch.device("cpu"))
    assert moments is not None
    torch.testing.assert_close(moments.double(), torch.stack([expected_mean, expected_std]))

    state = fitted.begin(None, BATCH, ROWS)  # type: ignore[arg-type]
    assert state is not None
    assert_only_ssm(state)
    drawn, n = ssm(state), 64 * MODEL.headdim * MODEL.d_state
    z = (drawn.mean((1, 3, 4)) - expected_mean) / expected_std * n**0.5
    assert z.abs().max() < 5
    ratio = drawn.std((1, 3, 4)) / expected_std
    assert (ratio - 1).abs().max() < 5 / (2 * n) ** 0.5

    # The running moments move a tenth of the way to the next step's.
    before = fitted.running
    fitted.end({}, ROWS, random_state(16, mean + 1, std))
    fitted.end_step(ONE_PROCESS)
    assert before is not None
    assert fitted.running is not None
    assert (fitted.running[0] - before[0] - 0.1).abs().max() < 0.02


def test_rows_reset_with_the_given_probability() -> None:
    def zero_rows(p: float, rows: Rows = ROWS) -> Tensor:
        state = make(make_config(name="noise", std=1.0, reset_probability=p)).begin(None, BATCH, rows)
        return ~ssm(state).flatten(2).any(2).any(0)

    assert not zero_rows(0.0).any()
    assert zero_rows(1.0).all()
    counts = [int(zero_rows(0.25, Rows(step, 0, 0, 64)).sum()) for step in range(20)]
    assert len(set(counts)) > 3
    assert sum(counts) == pytest.approx(0.25 * 64 * 20, abs=5 * (0.25 * 0.75 * 64 * 20) ** 0.5)
    # The rows of a step reset alike however they are shared out.
    parts = [zero_rows(0.25, Rows(3, 0, first, 64)) for first in (0, 64)]
    resets = make(make_config(name="noise", std=1.0, reset_probability=0.25)).resets
    assert torch.equal(torch.cat(parts), resets(Rows(3, 0, 0, 128), torch.device("cpu")))


class Spy(Passed):
    """Keeps what micro-batches begin with and end in."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.log: list[tuple[Rows, ModelState | None, ModelState]] = []

    def begin(self, model: Any, batch: Batch, rows: Rows) -> ModelState | None:
        self.began = super().begin(model, batch, rows)
        return self.began

    def end(self, batch: Batch, rows: Rows, final: ModelState) -> None:
        super().end(batch, rows, final)
        self.log.append((rows, self.began, final))


def test_passed_states_are_the_last_steps_final_states_of_other_rows() -> None:
    module = LanguageModel(make_config(steps=4, accumulate=2, name="passed"))
    spy = module.initial_state = Spy(module.config, module.mitigation)
    batches = [make_batch(rows=4) for _ in range(8)]
    run_step(module, batches)
    assert [(rows.step, rows.part, rows.first) for rows, _, _ in spy.log] == [
        (step, part, 4 * part) for step in range(4) for part in range(2)
    ]
    shifts = []
    for i, (_, began, final) in enumerate(spy.log):
        if i < 2:
            assert began is None
        else:
            assert began is not None
            assert_only_ssm(began)
            assert not ssm(began).requires_grad
            before = ssm(spy.log[i - 2][2])
            (shift,) = [s for s in range(4) if torch.equal(ssm(began), before.roll(-s, 1))]
            shifts.append(shift)
        with torch.no_grad():
            expected = module.model(batches[i]["ids"], began).state
        torch.testing.assert_close(ssm(final), ssm(expected))
    assert 0 not in shifts  # no row begins where its own text left off


def test_passed_states_suit_fewer_and_longer_rows() -> None:
    passed: Passed = make(make_config(name="passed"))
    final = random_state(8, torch.zeros(LAYERS, HEADS), torch.ones(LAYERS, HEADS))
    passed.end({}, Rows(2, 0, 0, 8), final)
    state = passed.begin(None, {"ids": torch.zeros(4, 48)}, Rows(3, 0, 0, 4))  # type: ignore[arg-type]
    assert state is not None
    assert any(torch.equal(ssm(state), ssm(final).roll(-s, 1)[:, :4]) for s in range(1, 8))


@pytest.mark.parametrize("name", ["noise", "fitted_noise", "passed"])
def test_training_begins_elsewhere_and_validation_at_zero(name: str) -> None:
    losses, validations = {}, {}
    std = {"std": 3.0} if name == "noise" else {}
    batches, validation = [make_batch() for _ in range(3)], [make_batch() for _ in range(2)]
    for kind, settings in (("zero", {}), (name, std), (name, {**std, "reset_probability": 1.0})):
        module = LanguageModel(make_config(steps=3, name=kind, **settings))
        run_step(module, batches, validation)
        key = (kind, settings.get("reset_probability", 0.0))
        losses[key], validations[key] = module.train_loss, module.val_metrics
    assert losses[name, 0.0] != losses["zero", 0.0]
    assert losses[name, 1.0] == losses["zero", 0.0]
    assert validations[name, 0.0] == validations["zero", 0.0]


def test_rows_survive_another_number_of_ranks() -> None:
    module = SimpleNamespace(config=make_config())
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        rows = torch.randn(24, 3).to(dtype)
        for accumulate, ranks in ((1, 1), (3, 1), (2, 4), (1, 12)):
            trainers: list[Any] = [
                SimpleNamespace(
                    world_size=ranks,
                    accumulate_grad_batches=accumulate,
                    global_rank=rank,
                    lightning_module=module,
                )
                for rank in range(ranks)
            ]
            shares = [own_rows(rows, trainer) for trainer in trainers]
            size = 24 // (accumulate * ranks)
            for rank, parts in enumerate(shares):
                for part, share in enumerate(parts):
                    first = (part * ranks + rank) * size  # as data/batches.py shares a step's samples
                    assert torch.equal(share, rows[first : first + size])
            everything = torch.stack([torch.stack(parts) for parts in shares])
            for trainer in trainers:
                trainer.strategy = SimpleNamespace(
                    all_gather=lambda own, e=everything: e.view(torch.uint8) if own.numel() else own
                )
                assert torch.equal(gather_rows(own_rows(rows, trainer), trainer), rows)


def test_a_state_that_is_not_finite_is_not_saved() -> None:
    passed: Passed = make(make_config(name="passed"))
    final = random_state(4, torch.zeros(LAYERS, HEADS), torch.ones(LAYERS, HEADS))
    passed.end({}, ROWS, final)
    saved = passed.state_dict(ONE_PROCESS)
    assert torch.equal(ssm(passed.last[0]), ssm(final))
    again: Passed = make(make_config(name="passed"))
    again.load_state_dict(saved, ONE_PROCESS)
    pairs = zip(again.last[0].tensors(), passed.last[0].tensors(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    final.layers[1].ssm[2, 0, 0, 0] = float("nan")  # type: ignore[index]
    passed.end({}, ROWS, final)
    with pytest.raises(RunError, match=r"after step 3: not finite: the state of layer 1 in row 2; nothing"):
        passed.state_dict(ONE_PROCESS)

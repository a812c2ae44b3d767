"""A sequence sharded over ranks against the same on one: losses, gradients, states, whole training runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from conf.load import from_command_line
from conf.schema import ModelConfig, TrainConfig
from data.batches import Piece
from kernels.context import Context
from kernels.ssd import Mitigation
from lightning_modules.backbone import Mamba2LM
from lightning_modules.segments import segmented_losses
from lightning_modules.state import ModelState
from tests.conftest import assert_close
from tests.lightning_modules.launcher import call_on_ranks, train, train_on_ranks
from tests.lightning_modules.test_ranks import SETTINGS, contents, cut_off, metrics
from tests.lightning_modules.test_ranks import assert_close as assert_near

CONFIG = ModelConfig(d_model=32, n_layers=2, d_state=8, headdim=16, vocab_size=40, chunk_size=16)
BATCH, LENGTH = 2, 48
NONE = Mitigation()


def random_state(rule: Mitigation) -> ModelState:
    zero = ModelState.zeros(CONFIG, BATCH, "cpu", torch.float32, rule)
    *layers, position = zero.tensors()
    return zero.with_tensors([*(torch.randn_like(t) for t in layers), position + 3])


def check_model(
    given: str,
    rule: Mitigation,
    length: int | None,
    truncate_after: int | None = None,
    overlap: bool | None = None,
) -> None:
    context = Context(dist.group.WORLD, overlap)
    model, size = Mamba2LM(CONFIG), context.size
    ids = torch.randint(CONFIG.vocab_size, (BATCH, LENGTH + 1))
    state = random_state(rule) if given == "state" else None
    batch = {"ids": ids[:, :-1], "targets": ids[:, 1:], "weight": torch.rand(BATCH, LENGTH)}
    if given == "documents":
        batch["document_starts"] = torch.rand(BATCH, LENGTH) < 0.05
        batch["document_starts"][1, :: LENGTH // size] = True
    options: dict[str, Any] = {"mitigation": rule, "truncate_after": truncate_after}

    def run(batch: dict[str, Any], length: int | None, **more: Any) -> tuple[Any, ModelState, list[Any]]:
        losses, final = segmented_losses(
            model, batch["ids"], batch["targets"], state,
            document_starts=batch.get("document_starts"), length=length, **options, **more,
        )  # fmt: skip
        loss = (batch["weight"] * losses).sum()
        return losses.detach(), final.detach(), list(torch.autograd.grad(loss, list(model.parameters())))

    whole, final, expected = run(batch, None if length is None else size * length)
    piece = Piece(context.rank, size, length)
    losses, last, gradients = run(piece.of(batch), length, context=context)
    assert_close(losses, piece.of({"losses": whole})["losses"], 1e-5, "losses")
    for name, own, one in zip(dict(model.named_parameters()), gradients, expected, strict=True):
        own = own.contiguous()
        dist.all_reduce(own)
        assert_close(own, one, 1e-5, f"gradient of {name}")
    assert torch.equal(last.position, final.position)
    for own, one in zip(last.layers, final.layers, strict=True):
        assert_close(own.ssm, one.ssm, 1e-5, "SSM state")
        if context.rank == 0:
            assert_close(own.conv, one.conv, 1e-5, "inputs of the convolution")


def check_autocast() -> None:
    """bf16 products, fp32 summaries: as far from one process as bf16 is from itself."""
    context = Context(dist.group.WORLD)
    model, ids = Mamba2LM(CONFIG), torch.randint(CONFIG.vocab_size, (BATCH, LENGTH + 1))
    batch = {"ids": ids[:, :-1], "targets": ids[:, 1:]}
    with torch.autocast("cpu", torch.bfloat16):
        whole, _ = model.token_losses(**batch)
        own = Piece(context.rank, context.size, 6).of(batch)
        losses, final = segmented_losses(model, **own, length=6, context=context)
    assert all(layer.ssm.dtype == torch.float32 for layer in final.layers)  # type: ignore[union-attr]
    expected = torch.autograd.grad(whole.sum(), list(model.parameters()))
    gradients = torch.autograd.grad(losses.sum(), list(model.parameters()))
    for actual, one in zip(gradients, expected, strict=True):
        actual = actual.contiguous()
        dist.all_reduce(actual)
        assert_close(actual, one, 3e-2, "gradient")


def check_one_reduction() -> None:
    """What DDP and ZeRO hang on a parameter runs once a backward pass, however many segments."""
    context = Context(dist.group.WORLD)
    model, ids = Mamba2LM(CONFIG), torch.randint(CONFIG.vocab_size, (BATCH, 24))
    counts = dict.fromkeys(dict(model.named_parameters()), 0)
    for name, parameter in model.named_parameters():

        def count(_: torch.Tensor, name: str = name) -> None:
            counts[name] += 1

        parameter.register_post_accumulate_grad_hook(count)
    segmented_losses(model, ids, ids, length=5, context=context)[0].sum().backward()
    assert set(counts.values()) == {1}


def check_models() -> None:
    check_autocast()
    check_one_reduction()
    check_model("state", NONE, None)
    check_model("documents", NONE, None)
    check_model("zero", NONE, 9)  # the last segment is shorter
    check_model("documents", Mitigation("hard_reset", every=11), 4, overlap=False)
    check_model("state", NONE, 4, truncate_after=2)


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_and_states_are_those_of_one_process(tmp_path: Path, size: int) -> None:
    call_on_ranks(size, check_models, output=tmp_path / "output.txt")


def train_sharded(run_dir: Path, ranks: int, argv: list[str]) -> None:
    output = run_dir.parent / f"{run_dir.name}.txt"
    assert train_on_ranks(ranks, [*argv, f"run_dir={run_dir}"], output) == [0] * ranks, output.read_text()


def assert_equal_runs(one: Path, other: Path, step: int = 6) -> None:
    """Weights and metrics but for rounding."""
    for part in ("state_dict", "initial_state"):
        assert_near(contents(one, step)[part], contents(other, step)[part])
    assert_near(metrics(one), metrics(other))


PACKED = [*SETTINGS, "data.documents.layout=packed", "data.documents.min_tokens=1"]
PASSKEY = [*SETTINGS, "data.name=passkey", "data.train_length=192", "trainer.max_steps=3"]


def test_data_x_context_trains_as_one_rank(tmp_path: Path) -> None:
    """Two groups of two ranks, documents that begin anywhere, two micro-batches a step."""
    assert train([*PACKED, f"run_dir={tmp_path}/one"], tmp_path / "output.txt") == 0
    train_sharded(tmp_path / "four", 4, [*PACKED, "trainer.context_parallel=2"])
    assert_equal_runs(tmp_path / "one", tmp_path / "four")


def test_two_ranks_train_on_prompts_as_one(tmp_path: Path) -> None:
    """Answers, and whole rows right, are counted over all pieces."""
    assert train([*PASSKEY, f"run_dir={tmp_path}/one"], tmp_path / "output.txt") == 0
    train_sharded(tmp_path / "two", 2, [*PASSKEY, "trainer.context_parallel=2"])
    assert_equal_runs(tmp_path / "one", tmp_path / "two", step=3)
    assert any("val/exact" in record for record in metrics(tmp_path / "two"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "further",
    [
        ["trainer.segment_length=9", "data.documents.layout=packed"],
        ["initial_state.name=carried", "initial_state.reset_probability=0.2"],
        ["initial_state.name=fitted_noise", "initial_state.reset_probability=0.2"],
        ["initial_state.name=passed", "initial_state.reset_probability=0.2"],
    ],
    ids=lambda further: further[0],
)
def test_four_ranks_train_as_one(tmp_path: Path, further: list[str]) -> None:
    """And one rank goes on where four were cut off: states are saved by row."""
    argv = [*SETTINGS, *further]
    assert train([*argv, f"run_dir={tmp_path}/one"], tmp_path / "output.txt") == 0
    train_sharded(tmp_path / "four", 4, [*argv, "trainer.context_parallel=4"])
    cut_off(tmp_path / "four", tmp_path / "mixed")
    assert train([*argv, f"run_dir={tmp_path}/mixed"], tmp_path / "output.txt") == 0
    assert_equal_runs(tmp_path / "one", tmp_path / "four")
    assert_equal_runs(tmp_path / "one", tmp_path / "mixed")


ONE_STEP = [*PACKED, "trainer.max_steps=1", "trainer.segment_length=6", "optim.grad_clip=0"]
MESHES = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # ranks, and how many of them share a row


def gradients(run_dir: Path) -> list[torch.Tensor]:
    """Of the first step: AdamW's first moment, which has taken a tenth of each."""
    saved = contents(run_dir, 1)["optimizer_states"][0]
    assert {group["betas"][0] for group in saved["param_groups"]} == {0.9}
    return [saved["state"][index]["exp_avg"] * 10 for index in sorted(saved["state"])]


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step of one plain process."""
    run_dir = tmp_path_factory.mktemp("one_step") / "one"
    output = run_dir.with_suffix(".txt")
    assert train([*ONE_STEP, f"run_dir={run_dir}"], output) == 0, output.read_text()
    return run_dir


@pytest.mark.parametrize(
    ("stage", "ranks", "size"),
    [
        pytest.param(stage, *mesh, marks=[] if (stage, *mesh) == (2, 4, 2) else pytest.mark.slow)
        for stage in (1, 2, 3)
        for mesh in MESHES
    ],
)
def test_gradients_of_zero_x_context_are_those_of_one_process(
    tmp_path: Path, one_step: Path, stage: int, ranks: int, size: int
) -> None:
    """DeepSpeed shards over all ranks of the mesh, context ranks included."""
    zero = ["trainer.strategy=deepspeed", f"deepspeed.stage={stage}", f"trainer.context_parallel={size}"]
    train_sharded(tmp_path / "run", ranks, [*ONE_STEP, *zero])
    expected, actual = gradients(one_step), gradients(tmp_path / "run")
    assert len(expected) == len(actual) == 20
    for index, (own, one) in enumerate(zip(actual, expected, strict=True)):
        assert one.norm() > 0
        assert (own - one).norm() <= 1e-5 * one.norm(), index
    assert_equal_runs(one_step, tmp_path / "run", step=1)


NAME = "trainer.context_parallel=2"
REFUSED = [
    (["trainer.devices=3"], f"{NAME}: must divide the ranks"),
    (["data.train_length=257"], f"data.train_length=257: must be a multiple of {NAME}"),
    (["trainer.segment_length=2"], "data.train_length=256: leaves a rank 2 tokens at a time"),
    (["trainer.segment_length=126"], "data.train_length=256: leaves a rank 2 tokens at a time"),
    (["trainer.devices=4", "data.batch_size=3"], "multiple of devices * num_nodes / context_parallel"),
    (
        ["mitigation.name=state_norm", "mitigation.max_norm=1", "mitigation.every=1"],
        f"{NAME}: not under mitigation.name=state_norm: clipping is not linear",
    ),
    (
        ["mitigation.name=sliding_window", "mitigation.window=8"],
        f"{NAME}: not under mitigation.name=sliding_window: what enters",
    ),
    (
        ["mitigation.name=hard_reset", "mitigation.every=8", "mitigation.heads=[L0H1]"],
        f"{NAME}: not under hard_reset of some heads",
    ),
    (
        ["data.passkey.filler_weight=0", "initial_state.name=carried", "initial_state.bptt_segments=2"],
        f"{NAME}: not with initial_state.bptt_segments above 1",
    ),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=lambda value: str(value[0])[:30])
def test_what_does_not_fit_is_refused_at_once(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        from_command_line(TrainConfig, "", ["trainer.devices=2", NAME, *argv])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_pieces_cover_every_row() -> None:
    batch = {"ids": torch.arange(40).view(2, 20)}
    assert Piece(1, 2).of(batch)["ids"].tolist() == [[*range(10, 20)], [*range(30, 40)]]
    own = [Piece(rank, 2, segment=4).of(batch)["ids"][0].tolist() for rank in range(2)]
    assert own == [[0, 1, 2, 3, 8, 9, 10, 11, 16, 17], [4, 5, 6, 7, 12, 13, 14, 15, 18, 19]]

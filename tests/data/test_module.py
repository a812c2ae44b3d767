"""The DataModule inside a real Trainer: a resumed run sees what an uninterrupted one sees."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from conf.load import parse
from conf.schema import TrainConfig
from data.module import TokenDataModule

# Lightning 2.6.6 still asks for what torch 2.13 calls by another name.
pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")

Sample = tuple[int, ...]


@dataclass
class Interrupt(Exception):
    """Stands for a kill in the middle of training."""


class Recorder(pl.LightningModule):
    """Counts tokens with a unigram model and records which samples every optimizer step consumed."""

    def __init__(self, kill_at: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(256))
        self.pending: list[Sample] = []
        self.steps: dict[int, list[Sample]] = {}
        self.validated: list[tuple[int, list[Sample]]] = []
        self.kill_at = kill_at

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        step = self.trainer.global_step
        if (step, len(self.pending)) == self.kill_at:
            raise Interrupt
        self.pending += [tuple(row) for row in batch["ids"].tolist()]
        nll = -self.logits.log_softmax(0)[batch["targets"]]
        return (batch["loss_weight"] * nll).sum() / batch["loss_weight"].sum()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        step = self.trainer.global_step
        assert step not in self.steps
        super().optimizer_step(*args, **kwargs)  # runs training_step on the step's last micro-batch
        self.steps[step], self.pending = self.pending, []

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        if batch_idx == 0:
            self.validated.append((self.trainer.global_step, []))
        self.validated[-1][1].extend(tuple(row) for row in batch["ids"].tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class Save(pl.Callback):
    """A checkpoint after every optimizer step, or at an exception as ModelCheckpoint can make one."""

    def __init__(self, path: Path, at_exception: bool) -> None:
        self.path, self.at_exception = path, at_exception

    def on_train_batch_end(self, trainer: pl.Trainer, module: Recorder, *_: Any) -> None:
        if not self.at_exception and not module.pending:
            trainer.save_checkpoint(self.path)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if self.at_exception:
            trainer.save_checkpoint(self.path)


@dataclass
class Run:
    """What one process of a run saw."""

    steps: dict[int, list[Sample]] = field(default_factory=dict)
    validated: list[tuple[int, list[Sample]]] = field(default_factory=list)
    weights: torch.Tensor | None = None


OPTIONS = ["data.batch_size=8", "data.train_length=160", "trainer.max_steps=6", "data.val_sequences=5"]
CURRICULUM = ["data.train_length=320", "data.curriculum_length=160", "data.curriculum_steps=3"]


@pytest.fixture
def documents(tmp_path: Path) -> list[str]:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text("".join(f"line {i}.{j}\n" for j in range(20 + 10 * i)))
    return ["data.name=documents", f"data.documents.source={folder}"]


def fit(
    *options: str,
    checkpoint: Path | None = None,
    save: Save | None = None,
    kill_at: tuple[int, int] | None = None,
) -> Run:
    config = parse(TrainConfig, [*OPTIONS, *options])
    module = Recorder(kill_at)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=config.trainer.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=config.trainer.accumulate,
        val_check_interval=2 * config.trainer.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[] if save is None else [save],
    )
    try:
        trainer.fit(module, datamodule=TokenDataModule(config), ckpt_path=checkpoint)
    except Interrupt:
        assert kill_at is not None
    return Run(module.steps, module.validated, module.logits.detach().clone())


def check_resumed(whole: Run, before: Run, after: Run, killed: int) -> None:
    assert sorted(before.steps) == list(range(killed))
    assert sorted(after.steps) == list(range(killed, 6))
    assert before.steps | after.steps == whole.steps
    assert [v for v in before.validated if v[0] <= killed] + [
        v for v in after.validated if v[0] > killed
    ] == (whole.validated)


@pytest.mark.parametrize("at_exception", [False, True], ids=["after a step", "at an exception"])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("stage", [[], CURRICULUM], ids=["one length", "curriculum"])
def test_resume_is_exact(accumulate: int, at_exception: bool, stage: list[str], tmp_path: Path) -> None:
    options = [*stage, f"trainer.accumulate={accumulate}"]
    whole = fit(*options)
    save = Save(tmp_path / "last.ckpt", at_exception)
    pending = next(iter(whole.steps.values())).__len__() // accumulate * (accumulate - 1)
    before = fit(*options, save=save, kill_at=(3, 0 if stage else pending))
    after = fit(*options, checkpoint=save.path)
    check_resumed(whole, before, after, killed=3)
    assert torch.equal(after.weights, whole.weights)


@pytest.mark.parametrize(("first", "second"), [(1, 2), (4, 1), (2, 8), (8, 2)])
@pytest.mark.parametrize("at_exception", [False, True], ids=["after a step", "at an exception"])
def test_resume_with_another_accumulation(
    first: int, second: int, at_exception: bool, tmp_path: Path
) -> None:
    whole = fit()
    save = Save(tmp_path / "last.ckpt", at_exception)
    before = fit(f"trainer.accumulate={first}", save=save, kill_at=(3, 8 // first * (first - 1)))
    after = fit(f"trainer.accumulate={second}", checkpoint=save.path)
    check_resumed(whole, before, after, killed=3)
    torch.testing.assert_close(after.weights, whole.weights)


def test_workers_change_nothing(tmp_path: Path, documents: list[str]) -> None:
    whole = fit(*documents)
    save = Save(tmp_path / "last.ckpt", at_exception=False)
    before = fit(*documents, "data.num_workers=2", save=save, kill_at=(4, 0))
    after = fit(*documents, "data.num_workers=1", checkpoint=save.path)
    check_resumed(whole, before, after, killed=4)
    assert torch.equal(after.weights, whole.weights)


@pytest.mark.parametrize("layout", ["packed", "consecutive"])
def test_documents_resume_exactly(layout: str, tmp_path: Path, documents: list[str]) -> None:
    options = [*documents, f"data.documents.layout={layout}", "trainer.accumulate=2"]
    whole = fit(*options)
    save = Save(tmp_path / "last.ckpt", at_exception=True)
    before = fit(*options, save=save, kill_at=(3, 4))
    after = fit(*options, checkpoint=save.path)
    check_resumed(whole, before, after, killed=3)
    assert torch.equal(after.weights, whole.weights)


@pytest.fixture
def mixture(tmp_path: Path, documents: list[str]) -> list[str]:
    for i in range(40):
        (tmp_path / f"many{i}.txt").write_text(f"many {i} " * 30)
    sources = f"[{{source: {tmp_path}/corpus, weight: 0.7}}, {{source: '{tmp_path}/many*.txt', weight: 0.3}}]"
    return ["data.name=documents", f"data.documents.mixture={sources}"]


STREAMING = ["data.documents.streaming=true"]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stage", [[], [*CURRICULUM, "data.batch_size=4"]], ids=["one length", "curriculum"])
@pytest.mark.parametrize("kind", ["mixture", "streaming", "streaming mixture"])
def test_mixtures_and_streams_resume_exactly(
    kind: str, stage: list[str], workers: int, tmp_path: Path, documents: list[str], mixture: list[str]
) -> None:
    options = [*(mixture if "mixture" in kind else documents), *stage]
    options += STREAMING if "streaming" in kind else []
    whole = fit(*options)
    save = Save(tmp_path / "last.ckpt", at_exception=False)
    before = fit(*options, f"data.num_workers={workers}", save=save, kill_at=(4, 0))
    after = fit(*options, f"trainer.accumulate={1 + workers}", checkpoint=save.path)
    check_resumed(whole, before, after, killed=4)
    assert workers or torch.equal(after.weights, whole.weights)


def test_a_mixture_keeps_its_weights_step_by_step(mixture: list[str]) -> None:
    for options in ([], STREAMING):
        module = make_module(*mixture, *options, "data.batch_size=10", "data.train_length=160")
        kinds = [b"many" in bytes(row) for row in seen(module.train_dataloader())]
        assert sum(kinds) == 18, "3 of 10 in each of 6 steps"
        assert [sum(kinds[i : i + 10]) for i in range(0, 60, 10)] == [3] * 6


def test_resume_refuses_other_weights(tmp_path: Path, mixture: list[str]) -> None:
    save = Save(tmp_path / "last.ckpt", at_exception=False)
    fit(*mixture, save=save, kill_at=(3, 0))
    mixture[1] = mixture[1].replace("0.7", "0.8").replace("0.3", "0.2")
    with pytest.raises(ValueError, match=r"^data\.documents\.source: .*changed since the checkpoint"):
        fit(*mixture, checkpoint=save.path)


def test_a_finished_run_goes_on_when_given_more_steps(tmp_path: Path) -> None:
    whole = fit()
    save = Save(tmp_path / "last.ckpt", at_exception=False)
    fit("trainer.max_steps=4", save=save)
    assert fit("trainer.max_steps=4", checkpoint=save.path).steps == {}
    after = fit(checkpoint=save.path)
    assert after.steps == {step: whole.steps[step] for step in (4, 5)}
    assert torch.equal(after.weights, whole.weights)


def test_resume_refuses_a_changed_corpus(tmp_path: Path, documents: list[str]) -> None:
    save = Save(tmp_path / "last.ckpt", at_exception=False)
    fit(*documents, save=save, kill_at=(3, 0))
    (tmp_path / "corpus" / "0.txt").write_text("rewritten")
    with pytest.raises(ValueError, match=r"^data\.documents\.source: .*changed since the checkpoint"):
        fit(*documents, checkpoint=save.path)


def make_module(*options: str) -> TokenDataModule:
    module = TokenDataModule(parse(TrainConfig, [*OPTIONS, *options]))
    module.prepare_data()
    module.setup("fit")
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    return module


def seen(loader: Any) -> Iterator[Sample]:
    for batch in loader:
        yield from (tuple(row) for row in batch["ids"].tolist())


def test_training_follows_the_seed_and_validation_does_not(documents: list[str]) -> None:
    for options in ([], documents):
        one, two = make_module(*options, "seed=1"), make_module(*options, "seed=2")
        assert set(seen(one.train_dataloader())) != set(seen(two.train_dataloader()))
        assert list(seen(one.val_dataloader())) == list(seen(two.val_dataloader()))
        assert not set(seen(one.train_dataloader())) & set(seen(one.val_dataloader()))
        assert len(list(seen(one.val_dataloader()))) == 5


def test_validation_documents_are_never_trained_on(documents: list[str]) -> None:
    def numbers(rows: Iterator[Sample]) -> set[str]:
        lines = [line for row in rows for line in bytes(row).decode().split("\n")[1:-1]]
        return {line.removeprefix("line ").split(".")[0] for line in lines if line.startswith("line ")}

    module = make_module(
        *documents, "data.documents.val_fraction=0.3", "trainer.max_steps=100", "data.val_sequences=99"
    )
    train, validation = numbers(seen(module.train_dataloader())), numbers(seen(module.val_dataloader()))
    assert train
    assert validation
    assert not train & validation


def test_the_vocabulary_must_hold_the_tokenizer(tokenizer_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^model\.vocab_size=256: data\.tokenizer=\S+ needs at least \d+$"):
        make_module(f"data.tokenizer={tokenizer_folder}")
    module = make_module(f"data.tokenizer={tokenizer_folder}", "model.vocab_size=512")
    assert next(iter(module.train_dataloader()))["ids"].shape == (8, 160)


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        (["data.train_length=20"], "data.train_length=20"),
        (["data.curriculum_length=20", "data.curriculum_steps=2"], "data.curriculum_length=20"),
        (["data.train_length=60", "data.passkey.digits=15"], "data.train_length=60"),
    ],
)
def test_a_passkey_longer_than_the_context_is_one_line(
    options: list[str], setting: str, tokenizer_folder: Path
) -> None:
    """With a tokenizer of which the config alone cannot know how many tokens a prompt takes."""
    with pytest.raises(ValueError, match=rf"^{setting}: a passkey prompt needs at least \d+ tokens; [^\n]+$"):
        make_module(f"data.tokenizer={tokenizer_folder}", "model.vocab_size=512", *options)


def test_a_missing_source_is_found_before_anything_starts() -> None:
    config = parse(TrainConfig, ["data.name=documents", "data.documents.source=/nowhere/at/all"])
    with pytest.raises(ValueError, match=r"^data\.documents\.source=/nowhere/at/all: no such file or folder"):
        TokenDataModule(config)

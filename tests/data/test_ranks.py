"""Two real processes under DDP see together what one process sees, and either continues the other's run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
import lightning.pytorch as pl
import torch
from conf.load import parse
from conf.schema import TrainConfig
from data.module import TokenDataModule

class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(256))
        self.train_rows, self.validation_rows = [], []

    def training_step(self, batch, batch_idx):
        self.train_rows += [[self.trainer.global_step, row] for row in batch["ids"].tolist()]
        return -self.logits.log_softmax(0)[batch["targets"]].mean()

    def validation_step(self, batch, batch_idx):
        counted = batch["loss_weight"].sum(1) > 0
        self.validation_rows += batch["ids"][counted].tolist()

    def on_train_end(self):
        record = {"train": self.train_rows, "validation": self.validation_rows}
        with open(f"{out}.{self.global_rank}.json", "w") as file:
            json.dump(record, file)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

out, ranks, stop, checkpoint, *options = sys.argv[1:]
config = parse(TrainConfig, options)
trainer = pl.Trainer(
    accelerator="cpu", devices=int(ranks), strategy="ddp" if int(ranks) > 1 else "auto", max_steps=int(stop),
    max_epochs=-1, accumulate_grad_batches=config.trainer.accumulate, val_check_interval=1.0,
    num_sanity_val_steps=0, limit_val_batches=1.0, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(Recorder(), datamodule=TokenDataModule(config), ckpt_path=checkpoint or None)
trainer.save_checkpoint(f"{out}.ckpt")
"""


def run(folder: Path, name: str, ranks: int, stop: int, checkpoint: str, *options: str) -> tuple[list, list]:
    """Train up to step `stop`; over all ranks, sorted: (step, row) of training, and rows of validation."""
    script, out = folder / "script.py", folder / name
    script.write_text(SCRIPT)
    config = ["data.batch_size=8", "data.train_length=128", "data.val_sequences=7", "trainer.max_steps=4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(out), str(ranks), str(stop), checkpoint, *config, *options]
    finished = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    records = [json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(ranks)]
    return tuple(sorted(row for record in records for row in record[key]) for key in ("train", "validation"))


@pytest.fixture
def mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, count in (("a", 90), ("b", 60)):
        texts = [f"{name}{i} " * (20 + i) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    sources = ", ".join(f"{{source: {tmp_path}/{n}.jsonl, weight: {w}}}" for n, w in (("a", 0.6), ("b", 0.4)))
    return ["data.name=documents", f"data.documents.mixture=[{sources}]"]


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_documents_come_in_one_order_on_1_2_and_4_ranks(
    streaming: str, tmp_path: Path, mixture: list[str]
) -> None:
    options = [*mixture, f"data.documents.streaming={streaming}"]
    train, validation = run(tmp_path, "whole", 1, 4, "", *options)
    assert len(train) == 32
    assert len({str(row) for row in train}) == 32
    first, _ = run(tmp_path, "first", 2, 2, "", "trainer.devices=2", *options)
    checkpoint = str(tmp_path / "first.ckpt")
    second, second_validation = run(tmp_path, "second", 4, 4, checkpoint, "trainer.devices=4", *options)
    assert sorted(first + second) == train
    assert second_validation == validation
    third, _ = run(tmp_path, "third", 1, 4, checkpoint, "data.num_workers=1", *options)
    assert sorted(first + third) == train


@pytest.mark.slow
def test_ranks_share_every_step_and_may_change_between_runs(tmp_path: Path) -> None:
    train, validation = run(tmp_path, "whole", 1, 4, "")
    assert len(train) == 32
    assert len(validation) == 7
    first, _ = run(tmp_path, "first", 2, 2, "", "trainer.devices=2", "trainer.accumulate=2")
    checkpoint = str(tmp_path / "first.ckpt")
    second, second_validation = run(tmp_path, "second", 1, 4, checkpoint, "trainer.accumulate=4")
    assert sorted(first + second) == train
    assert second_validation == validation
    third, third_validation = run(tmp_path, "third", 2, 4, checkpoint, "trainer.devices=2")
    assert sorted(first + third) == train
    assert third_validation == validation

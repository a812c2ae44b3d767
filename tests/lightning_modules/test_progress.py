"""The bar and its lines count tokens: of the whole run, across resumes, on rank 0 alone."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from conf.load import parse
from conf.schema import TrainConfig
from lightning_modules.callbacks import progress
from lightning_modules.callbacks.progress import Progress, short

# 4 x 128 = 512 tokens a step, in two micro-batches; 5,120 in all.
CONFIG = parse(
    TrainConfig,
    [
        *("data.train_length=128", "data.batch_size=4", "trainer.accumulate=2", "trainer.max_steps=10"),
        *("trainer.log_every=1", "optim.warmup_steps=1"),
    ],
)


class Run:
    """A trainer that stands where a test puts it, and a clock that goes 2 s a micro-batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rank: int = 0, terminal: bool = True) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)
        self.output = io.StringIO()
        console = Console(file=self.output, force_terminal=terminal, width=120)
        metrics: Any = SimpleNamespace(
            tokens_per_step=512, tokens_per_second=300.0, last={"train/loss": 1.5, "train/lr": 1e-3}
        )
        self.progress = Progress(CONFIG, metrics, console)
        self.trainer: Any = SimpleNamespace(global_step=0, is_global_zero=rank == 0)

    def start(self, step: int) -> None:
        self.trainer.global_step = step
        self.progress.on_train_start(self.trainer, None)  # type: ignore[arg-type]

    def micro_batch(self, step: int) -> None:
        self.now += 2.0
        self.trainer.global_step = step
        self.progress.on_train_batch_end(self.trainer, None, None, None, 0)  # type: ignore[arg-type]

    def end(self) -> str:
        self.progress.on_train_end(self.trainer, None)  # type: ignore[arg-type]
        return self.output.getvalue()


def test_a_resumed_bar_counts_all_tokens_and_those_of_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    run.start(step=4)
    assert run.progress.seconds_left() is None
    run.micro_batch(4)  # the first of two: half a step
    assert (
        run.progress.describe() == "2.3K/5.12K tokens  300 tokens/s  0:00:22 left  loss 1.5000  lr 1.00e-03"
    )
    run.micro_batch(5)
    assert run.progress.tokens == 5 * 512
    assert run.progress.seconds_left() == pytest.approx(5 * 4.0)  # 256 tokens took 2 s
    run.micro_batch(5)
    for step in range(6, 11):
        run.micro_batch(step)
    assert run.progress.tokens == 5120
    shown = run.end()
    assert "2.05K/5.12K tokens" in shown  # where it went on
    assert "5.12K/5.12K tokens" in shown
    assert "loss 1.5000" in shown


def test_other_ranks_show_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for terminal in (True, False):
        run = Run(monkeypatch, rank=1, terminal=terminal)
        run.start(step=9)
        run.micro_batch(9)
        run.micro_batch(10)
        assert run.end() == ""
    assert capsys.readouterr().out == ""


def test_without_a_terminal_there_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(monkeypatch, terminal=False)
    run.start(step=0)
    for step in range(1, 11):
        run.micro_batch(step - 1)
        run.micro_batch(step)
    assert run.end() == ""
    assert capsys.readouterr().out == (
        "step 10/10  5.12K/5.12K tokens  300 tokens/s  0:00:00 left  loss 1.5000  lr 1.00e-03\n"
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1K"), (12_345, "12.3K"), (99_960, "100K"), (999_499, "999K"),
     (999_600, "1M"), (1_048_576, "1.05M"), (300_000_000_000, "300B"), (15_000_000_000_000, "15T")],
)  # fmt: skip
def test_three_digits(count: int, text: str) -> None:
    assert short(count) == text

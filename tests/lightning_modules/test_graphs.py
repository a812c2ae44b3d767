"""A micro-batch as one CUDA graph: its place in training on the CPU, where a replay computes anew; the graph
itself on a GPU."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.load import parse
from conf.schema import TrainConfig
from lightning_modules import graphs
from lightning_modules.checkpoints import read_weights
from lightning_modules.graphs import GraphedLoss
from lightning_modules.language_model import LanguageModel
from lightning_modules.state import ModelState
from lightning_modules.train import train
from tests.lightning_modules.test_side_by_side import config_of

ROOT = Path(__file__).parents[2]
NAMES = ("ids", "targets", "loss_weight", "document_starts")
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def recomputed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """In place of a graph: a replay computes again and writes where the capture's results lie."""
    captures: list[int] = []

    def tensors(result: Any) -> list[Tensor]:
        loss, final, gradients = result
        return [loss, *final.tensors(), *gradients]

    def capture(compute: Callable[[], Any], pool: Any) -> tuple[Any, Any]:
        captures.append(pool)
        result = compute()

        def replay() -> None:
            for kept, new in zip(tensors(result), tensors(compute()), strict=True):
                kept.copy_(new)

        return SimpleNamespace(replay=replay), result

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 7)
    return captures


def micro_batch(rows: int, length: int, starts: bool) -> dict[str, Tensor]:
    ids = torch.randint(256, (rows, length + 1))
    batch = {"ids": ids[:, :-1], "targets": ids[:, 1:], "loss_weight": torch.rand(rows, length)}
    batch["answer"] = torch.zeros(rows, length, dtype=torch.bool)
    return batch | ({"document_starts": torch.rand(rows, length) < 0.1} if starts else {})


@pytest.mark.parametrize("segment", [None, 16])
def test_gradients_add_up_as_without_a_graph(recomputed: list[int], segment: int | None) -> None:
    """Over shapes, states and weights that change between calls."""
    more = [] if segment is None else [f"trainer.segment_length={segment}"]
    module = LanguageModel(config_of("zero", *more))
    module.configure_model()
    graphed = GraphedLoss(module._weighted_loss, list(module.parameters()), NAMES)
    state: ModelState | None = None
    for step, shape in enumerate([(2, 40, False), (1, 40, True), (2, 40, False), (2, 40, False)]):
        batch, sums = micro_batch(*shape), []
        given = None if step < 3 else state
        for loss_of in (graphed, module._weighted_loss):
            module.zero_grad()
            for scale in (0.5, 2.0):  # two micro-batches into one gradient
                loss, final = loss_of(batch, given)
                (scale * loss).backward()
            found = [p.grad.clone() for p in module.parameters() if p.grad is not None]
            sums.append([loss.detach(), *found, *(t.detach() for t in final.tensors())])
        for ours, plain in zip(*sums, strict=True):
            torch.testing.assert_close(ours, plain)
        state = final.detach()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter *= 1.01
    assert recomputed == [7, 7, 7]  # two shapes, and one of them from a state


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("trainer.accelerator=cpu", "needs a CUDA device"),
        ("trainer.strategy=deepspeed", "use ddp"),
        ("trainer={devices: 2, context_parallel: 2}", "talk within a layer"),
        ("initial_state={name: carried, bptt_segments: 2}", "leave the micro-batch"),
        ("mitigation={name: hard_reset, every: 64}", "asks the host"),
    ],
)
def test_what_no_graph_holds_is_refused(setting: str, said: str) -> None:
    with pytest.raises(ValueError, match=rf"^trainer.cuda_graphs=true: .*{said}"):
        parse(TrainConfig, ["conf/train/smoke.yaml", "trainer.cuda_graphs=true", setting])


class TestOnGPU:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("kind", ["zero", "passed", "carried"])
    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_a_run_equals_the_run_without_graphs(self, kind: str, precision: str, tmp_path: Path) -> None:
        """A curriculum's border, two micro-batches, segments, validation between steps."""
        settings = [f"trainer.precision={precision}", "trainer={accelerator: cuda, accumulate: 2}"]
        results = []
        for graph in ("false", "true"):
            config = config_of(kind, *settings, "trainer.segment_length=96", f"trainer.cuda_graphs={graph}")
            folder = tmp_path / graph
            train(folder, config)
            metrics = json.loads((folder / "result.json").read_text())["metrics"]
            results.append((metrics, read_weights(folder)))
        (plain, weights), (ours, own) = results
        for name in ("train/loss", "train/grad_norm", "val/loss"):
            assert ours[name] == pytest.approx(plain[name], rel=1e-3 if precision == "32-true" else 1e-2)
        for name, value in own.items():
            torch.testing.assert_close(value, weights[name], rtol=2e-2, atol=2e-3, msg=name)

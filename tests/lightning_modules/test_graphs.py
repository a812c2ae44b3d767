"""A micro-batch as one CUDA graph: its place in training on the CPU, where a replay computes anew; the graph
itself on a GPU."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.load import parse
from conf.schema import TrainConfig
from kernels.ssd import Mitigation
from lightning_modules import graphs
from lightning_modules.checkpoints import read_weights
from lightning_modules.graphs import GraphedLoss
from lightning_modules.language_model import LanguageModel
from lightning_modules.plan import DEVICES
from lightning_modules.planning.estimate import estimate, why_eager
from lightning_modules.run_dir import RunError
from lightning_modules.state import ModelState
from lightning_modules.termination import Terminated
from lightning_modules.train import main, train
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


LARGE = ("conf/train/mamba2-370m.yaml", "trainer.accumulate=32")  # 16,384 tokens at a time


@pytest.mark.parametrize(
    ("settings", "off"),
    [
        ([], None),
        (["trainer.segment_length=4096", "conf/train/length/256k.yaml"], None),
        (["trainer.cuda_graphs=false"], "trainer.cuda_graphs=false"),
        (["trainer.accelerator=cpu"], "trainer.accelerator=cpu"),
        (["trainer.strategy=deepspeed"], "trainer.strategy=deepspeed"),
        (["trainer={devices: 2, context_parallel: 2}"], "trainer.context_parallel=2"),
        (["initial_state={name: carried, bptt_segments: 2}", "data.documents.layout=consecutive"],
         "initial_state.bptt_segments=2"),
        (["mitigation={name: hard_reset, every: 64}"], "mitigation.name=hard_reset"),
        (["trainer.accumulate=8"], "65,536 tokens at a time are launched faster than computed"),
        (["trainer.accumulate=8", "trainer.cuda_graphs=true"], None),
        (["trainer.segment_length=256"], "a row in 32 segments, more than 16"),
    ],
)  # fmt: skip
def test_graphs_are_on_where_they_can_be_and_pay(settings: list[str], off: str | None) -> None:
    config = parse(TrainConfig, [*LARGE, *settings])
    assert why_eager(config, DEVICES["h200"]) == off
    assert why_eager(config, replace(DEVICES["h200"], on_gpu=False)) == "no CUDA device"


@pytest.mark.parametrize("kind", ["zero", "passed"])
def test_graphs_are_off_where_they_and_validation_do_not_fit(kind: str) -> None:
    """What is captured after a first step without a state needs room for another's eager passes."""
    config = parse(TrainConfig, [*LARGE, f"initial_state.name={kind}"])
    device = DEVICES["h200"]
    with_graphs, without = (
        estimate(replace(config, trainer=replace(config.trainer, cuda_graphs=choice)), device)
        for choice in (True, False)
    )
    more = (with_graphs.peak - without.peak) / without.activations
    assert (0.1 < more < 0.3) if kind == "zero" else more > 1
    between = replace(device, memory=(with_graphs.peak + without.peak) / 2 / 0.92)
    assert (why_eager(config, between) or "").startswith("they would need ")
    assert not estimate(config, between).graphed


def test_a_step_takes_as_long_as_its_launches() -> None:
    config, device = parse(TrainConfig, [*LARGE, "trainer.cuda_graphs=false"]), DEVICES["h200"]
    eager = estimate(config, device)
    assert eager.seconds == eager.host_seconds > 2 * eager.device_seconds
    assert 32 * 0.24 < eager.seconds < 32 * 0.46  # a micro-batch of any size, measured on two hosts
    graphed = estimate(parse(TrainConfig, [*LARGE]), device)
    assert graphed.seconds == graphed.device_seconds


@pytest.mark.parametrize("error", [RuntimeError("it waits\nfor the device"), torch.OutOfMemoryError("no")])
def test_what_cannot_be_captured_trains_eagerly_unless_asked_for(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def capture(compute: Callable[[], Any], pool: Any) -> None:
        raise error

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 7)
    batch = micro_batch(2, 40, starts=False)
    for choice in ("null", "true"):
        module = LanguageModel(config_of("zero", "trainer.accelerator=auto", f"trainer.cuda_graphs={choice}"))
        module.configure_model()
        module.eager_because = None
        module.on_train_start()
        if choice == "true":
            kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else RunError
            said = "true: cannot be captured: it waits for the device" if kind is RunError else "no"
            with pytest.raises(kind, match=said):
                module._launch(batch, None)
            continue
        losses = [module._launch(batch, None)[0] for _ in range(2)]
        losses[1].backward()
        assert all(torch.equal(loss, module._weighted_loss(batch, None)[0]) for loss in losses)
        warned = capsys.readouterr().err
        assert warned.count("\n") == 1
        assert warned.startswith("warning: cuda graphs: off from step 0 on (")


@pytest.mark.parametrize("signal", [Terminated(15), KeyboardInterrupt()])
def test_a_signal_during_a_capture_ends_the_run(
    signal: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves a capture that cannot be ended: that error does not stand for it."""

    def capture(compute: Callable[[], Any], pool: Any) -> None:
        try:
            raise signal
        finally:
            raise RuntimeError("capture_end")

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 7)
    module = LanguageModel(config_of("zero"))
    module.configure_model()
    graphed = GraphedLoss(module._weighted_loss, list(module.parameters()), NAMES)
    with pytest.raises(type(signal)):
        graphed(micro_batch(2, 40, starts=False), None)


def test_gradients_of_a_replay_have_no_gradients_themselves(recomputed: list[int]) -> None:
    """They are numbers in a graph's memory: what they depend on is refused, not taken for nothing."""
    weight = torch.ones(3, requires_grad=True)
    empty = ModelState.zeros(config_of("zero").model, 1, "cpu", torch.float32, Mitigation())
    graphed = GraphedLoss(lambda batch, _: ((weight * batch["ids"]).square().sum(), empty), [weight], ["ids"])
    loss, _ = graphed({"ids": torch.ones(3)}, None)
    (gradient,) = torch.autograd.grad(loss.square(), [weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU alone")
def test_without_a_device_nothing_is_made(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(SystemExit) as end:
        main(["conf/train/smoke.yaml", "trainer.cuda_graphs=true", f"run_dir={run_dir}"])
    assert end.value.code == 2
    assert not run_dir.exists()


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

    def test_a_capture_that_waits_for_the_device_is_let_go(self, tmp_path: Path, capfd: Any) -> None:
        """A whole run, on whose way to the loss a number is read: it ends as without graphs."""
        config = config_of("zero", "trainer.accelerator=cuda", "trainer.segment_length=96")
        weights = []
        for asks in (False, True):
            folder, inner = tmp_path / str(asks), LanguageModel._weighted_loss

            def waits(self: Any, batch: Any, state: Any, inner: Any = inner) -> Any:
                loss, final = inner(self, batch, state)
                return loss * (2.0 if loss.item() == 0.25 else 1.0), final

            with pytest.MonkeyPatch.context() as patch:
                if asks:
                    patch.setattr(LanguageModel, "_weighted_loss", waits)
                train(folder, config)
            weights.append(read_weights(folder))
        assert capfd.readouterr().err.count("warning: cuda graphs: off from step 0 on") == 1
        assert torch.rand(3, device="cuda").isfinite().all()  # its generator works again
        for name, value in weights[1].items():
            torch.testing.assert_close(value, weights[0][name], rtol=2e-2, atol=2e-3, msg=name)

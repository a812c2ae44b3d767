"""CUDA graphs: what Python would launch kernel by kernel, as one launch.

The layers of a step are some 60 kernels each; launching them takes the host milliseconds a layer, however few
tokens there are. Where a micro-batch is computed faster than it is launched, a graph gives the rest back.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_modules.state import ModelState

WARM_UP = 3  # eager calls before a capture: kernels are compiled and tuned, buffers allocated
Batch = dict[str, Tensor]
T = TypeVar("T")


class CaptureError(RuntimeError):
    """Why something cannot be captured, in one line. What it computes can still be launched as always."""


def capture(compute: Callable[[], T], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """`compute` as a graph and its result, whose tensors every replay overwrites.

    pool: memory shared with other graphs, of which one runs at a time (`torch.cuda.graph_pool_handle`).
    """
    pool = pool or torch.cuda.graph_pool_handle()
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            compute()
    current.wait_stream(side)
    # Weights that autocast has cast are remembered until it ends: a replay must cast the new ones, and what
    # is run eagerly must not read a replay's.
    torch.clear_autocast_cache()
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads may ask things of the device meanwhile, as a loader does that pins memory.
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = compute()
    except BaseException:
        torch.cuda.set_stream(current)
        _abandon(pool)
        raise
    finally:
        torch.clear_autocast_cache()
    return graph, result


def _abandon(pool: Any) -> None:
    """After a capture that could not be ended. PyTorch 2.11 believes that it lasts and keeps its memory for
    good (seen on a GPU: with this it comes back); one that did end has nothing to undo. The device's default
    generator would refuse to draw, too: it begins anew at its seed."""
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    generator = torch.cuda.default_generators[device]
    fresh = torch.Generator(f"cuda:{device}").manual_seed(generator.initial_seed())
    generator.graphsafe_set_state(fresh.graphsafe_get_state())


class StaticInputs:
    """A batch and a state where a graph finds them: copies that keep their addresses."""

    def __init__(self, batch: Batch, state: ModelState | None) -> None:
        self.batch = {name: value.clone() for name, value in batch.items()}
        self.state = None if state is None else state.with_tensors(t.clone() for t in state.tensors())

    def fill(self, batch: Batch, state: ModelState | None) -> None:
        for name, value in self.batch.items():
            value.copy_(batch[name])
        if self.state is not None:
            assert state is not None
            for static, value in zip(self.state.tensors(), state.tensors(), strict=True):
                assert torch.promote_types(static.dtype, value.dtype) == static.dtype  # nothing is rounded
                static.copy_(value)


Loss = Callable[[Batch, ModelState | None], tuple[Tensor, ModelState]]


class GraphedLoss:
    """A loss, its gradients and the state after the batch, as one graph for each shape of batch.

    loss_of: batch, state -> loss (), final state; nothing in it may wait for the device.
    To autograd the loss is one operation on `parameters`; gradients are there before they are asked for.
    Raises CaptureError, or OutOfMemoryError, for a shape that cannot be captured.
    """

    def __init__(self, loss_of: Loss, parameters: Sequence[Tensor], names: Sequence[str]) -> None:
        self.loss_of, self.parameters, self.names = loss_of, list(parameters), names
        self._graphs: dict[tuple[Any, ...], _Captured] = {}
        self._pool: Any = None

    def __call__(self, batch: Batch, state: ModelState | None) -> tuple[Tensor, ModelState]:
        own = {name: batch[name] for name in self.names if name in batch}
        key = (*((name, value.shape) for name, value in own.items()), state is None)
        if key not in self._graphs:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._graphs[key] = _Captured(self, own, state, self._pool)
        captured = self._graphs[key]
        captured.replay(own, state)
        loss = _Replayed.apply(captured, *self.parameters)
        return loss, captured.final.with_tensors(t.clone() for t in captured.final.tensors())


class _Captured:
    """The graph of one shape."""

    def __init__(self, graphed: GraphedLoss, batch: Batch, state: ModelState | None, pool: Any) -> None:
        self.inputs = StaticInputs(batch, state)

        def compute() -> tuple[Tensor, ModelState, tuple[Tensor, ...]]:
            with torch.enable_grad():
                loss, final = graphed.loss_of(self.inputs.batch, self.inputs.state)
            gradients = torch.autograd.grad(loss, graphed.parameters)
            return loss.detach(), final.detach(), gradients

        try:
            self.graph, (self.loss, self.final, self.gradients) = capture(compute, pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # something in it waits for the device
            first = error.__context__ or error  # the last one only says that there was one before
            # Of no memory, or a signal that ends the run, the capture cannot end either.
            if isinstance(first, torch.OutOfMemoryError) or not isinstance(first, Exception):
                raise first from None
            raise CaptureError(" ".join(str(first).split())[:200]) from error

    def replay(self, batch: Batch, state: ModelState | None) -> None:
        self.inputs.fill(batch, state)
        self.graph.replay()


class _Replayed(torch.autograd.Function):
    """The loss of a replay that has been made, as a function of the parameters."""

    @staticmethod
    def forward(ctx: Any, captured: _Captured, *parameters: Tensor) -> Tensor:
        ctx.captured = captured
        return captured.loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """Once, before the next replay: its gradients are in the graph's own memory."""
        return None, *torch._foreach_mul(list(ctx.captured.gradients), scale)

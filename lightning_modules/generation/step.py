"""One token of every row, in static memory: what generation repeats, as it is or as a CUDA graph."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.conv import causal_conv1d
from kernels.ssd import ssd_token
from lightning_modules.backbone import Mamba2LM
from lightning_modules.generation.sampling import Sampler
from lightning_modules.graphs import capture
from lightning_modules.mitigations import LayerMitigations
from lightning_modules.state import ModelState


@dataclass(frozen=True)
class OneToken:
    """The operators of a single token that change the state where it lies, of the rows that are `active`
    (B,) bool; None: of all. Other rows stay as they are, bit for bit, under every mitigation."""

    active: Tensor | None
    mixer = None

    def causal_conv1d(self, x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Any:
        old = options["initial_state"]
        y, new = causal_conv1d(x, weight, bias, initial_state=old)
        old.copy_(new if self.active is None else torch.where(self.active[:, None, None], new, old))
        return y, old

    def ssd_scan(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any) -> Any:
        state = options.pop("initial_state")
        del options["document_starts"], options["chunk_size"]
        tokens = x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0]
        return ssd_token(state, *tokens, active=self.active, **options)[:, None], state

    def positions(self, position: Tensor, starts: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
        return position, position + (length if self.active is None else self.active)


class Step:
    """Feeds a token to the active rows and chooses the next of every row.

    state: its own copy, changed by every step.
    """

    def __init__(
        self, model: Mamba2LM, state: ModelState, mitigation: LayerMitigations, sampler: Sampler
    ) -> None:
        self.model, self.mitigation, self.sampler = model, mitigation, sampler
        with torch.inference_mode(False):
            self.state = state.with_tensors(t.clone() for t in state.tensors())

    @torch.no_grad()
    def choose(self, hidden: Tensor, uniforms: Tensor) -> Tensor:
        """Tokens (B,) behind final hidden states (B, d_model)."""
        logits = F.linear(hidden, self.model.lm_head.weight)
        return self.sampler(logits, uniforms.to(logits.device))

    def __call__(self, ids: Tensor, active: Tensor, uniforms: Tensor) -> Tensor:
        """ids (B,) int64, active (B,) bool, uniforms (B,) fp64, all on the CPU -> (B,) int64."""
        device = self.state.position.device
        return self._run(ids.to(device), None if bool(active.all()) else active.to(device), uniforms)

    @torch.no_grad()
    def _run(self, ids: Tensor, active: Tensor | None, uniforms: Tensor) -> Tensor:
        hidden, after = self.model.hidden(
            ids[:, None], self.state, mitigation=self.mitigation, context=OneToken(active)
        )
        self.state.position.copy_(after.position)
        return self.choose(hidden[:, 0], uniforms)


class CapturedStep(Step):
    """The same, replayed as a CUDA graph: a token costs one launch."""

    def __init__(
        self, model: Mamba2LM, state: ModelState, mitigation: LayerMitigations, sampler: Sampler
    ) -> None:
        super().__init__(model, state, mitigation, sampler)
        device = self.state.position.device
        rows = self.state.batch_size
        self._ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self._active = torch.zeros(rows, dtype=torch.bool, device=device)
        self._uniforms = torch.zeros(rows, dtype=torch.float64, device=device)
        with torch.cuda.device(device):
            # No row is active: the state stays as it is.
            self._graph, self._chosen = capture(lambda: self._run(self._ids, self._active, self._uniforms))

    def __call__(self, ids: Tensor, active: Tensor, uniforms: Tensor) -> Tensor:
        for static, value in zip(
            (self._ids, self._active, self._uniforms), (ids, active, uniforms), strict=True
        ):
            static.copy_(value)
        self._graph.replay()
        return self._chosen


def make_step(
    model: Mamba2LM,
    state: ModelState,
    mitigation: LayerMitigations,
    sampler: Sampler,
    cuda_graph: bool | None,
) -> Step:
    """A graph on a GPU unless cuda_graph=false; where none can be captured an error, not the slower way."""
    on_gpu = state.position.is_cuda
    if cuda_graph and not on_gpu:
        raise ValueError("cuda_graph=True: needs a GPU; leave it out or use device=cuda")
    if not on_gpu or cuda_graph is False:
        return Step(model, state, mitigation, sampler)
    try:
        return CapturedStep(model, state, mitigation, sampler)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"cuda_graph={cuda_graph}: the step cannot be captured ({reason}); set cuda_graph=false"
        ) from error

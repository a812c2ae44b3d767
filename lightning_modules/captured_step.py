"""One optimizer step as a CUDA graph: forward, backward, clipping and AdamW, replayed on static tensors.

Differs from the eager step in where it rounds: gradients are divided by the step's weight on the device.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.language_model import LanguageModel
from lightning_modules.state import ModelState

WARM_UP = 3  # eager steps before the capture: kernels are compiled and tuned, buffers allocated


class CapturedStep:
    """Captured for one shape of batch. Weights and moments are left as they were.

    After a replay `loss` and `norm` hold the step's values, on the device.
    """

    def __init__(
        self,
        module: LanguageModel,
        optimizer: torch.optim.Optimizer,
        batch: dict[str, Tensor],
        state: ModelState | None,
    ) -> None:
        self.module, self.optimizer = module, optimizer
        self.batch = {name: value.clone() for name, value in batch.items() if name != "answer"}
        self.state = None if state is None else state.with_tensors(t.clone() for t in state.tensors())
        for group in optimizer.param_groups:
            if not isinstance(group["lr"], Tensor):
                group["lr"] = torch.tensor(group["lr"], device=self.batch["ids"].device)
            group["capturable"] = True
        before = self._snapshot()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                optimizer.zero_grad(set_to_none=True)
                self._compute()
        torch.cuda.current_stream().wait_stream(side)
        optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss, self.norm, self.final = self._compute()
        self._put_back(before)

    def replay(self, batch: dict[str, Tensor], state: ModelState | None) -> ModelState:
        """One step; returns the state after the batch, a copy that later replays leave alone."""
        for name, value in self.batch.items():
            value.copy_(batch[name])
        if self.state is not None:
            assert state is not None
            for static, value in zip(self.state.tensors(), state.tensors(), strict=True):
                static.copy_(value)
        self.graph.replay()
        return self.final.with_tensors(t.clone() for t in self.final.tensors())

    def _compute(self) -> tuple[Tensor, Tensor, ModelState]:
        module, batch = self.module, self.batch
        losses, final = module.model.token_losses(
            batch["ids"],
            batch["targets"],
            self.state,
            document_starts=batch.get("document_starts"),
            mitigation=module.mitigation,
        )
        weight = batch["loss_weight"].sum()
        loss = (batch["loss_weight"] * losses).sum() / weight
        loss.backward()
        parameters = [p for p in module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if module.config.optim.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, module.config.optim.grad_clip, norm)
        self.optimizer.step()
        return loss.detach(), norm.detach(), final.detach()

    def _snapshot(self) -> tuple[list[Tensor], dict[Any, dict[str, Tensor]]]:
        weights = [p.detach().clone() for p in self.module.parameters()]
        state = self.optimizer.state
        return weights, {p: {k: v.clone() for k, v in state[p].items()} for p in state}

    def _put_back(self, before: tuple[list[Tensor], dict[Any, dict[str, Tensor]]]) -> None:
        """Undo the warm-up in place: the graph keeps the addresses."""
        weights, states = before
        with torch.no_grad():
            for parameter, value in zip(self.module.parameters(), weights, strict=True):
                parameter.copy_(value)
            for key, values in self.optimizer.state.items():
                for name, value in values.items():
                    value.copy_(states[key][name]) if key in states else value.zero_()

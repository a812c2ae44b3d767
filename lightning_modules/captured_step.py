"""One optimizer step as a CUDA graph: forward, backward, clipping and AdamW, replayed on static tensors.

Differs from the eager step in where it rounds: gradients are divided by the step's weight on the device.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.graphs import StaticInputs, capture
from lightning_modules.language_model import LanguageModel
from lightning_modules.state import ModelState


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
        self.inputs = StaticInputs({n: value for n, value in batch.items() if n != "answer"}, state)
        for group in optimizer.param_groups:
            if not isinstance(group["lr"], Tensor):
                group["lr"] = torch.tensor(group["lr"], device=batch["ids"].device)
            group["capturable"] = True
        before = self._snapshot()
        self.graph, (self.loss, self.norm, self.final) = capture(self._compute)
        self._put_back(before)

    def replay(self, batch: dict[str, Tensor], state: ModelState | None) -> ModelState:
        """One step; returns the state after the batch, a copy that later replays leave alone."""
        self.inputs.fill(batch, state)
        self.graph.replay()
        return self.final.with_tensors(t.clone() for t in self.final.tensors())

    def _compute(self) -> tuple[Tensor, Tensor, ModelState]:
        module, batch = self.module, self.inputs.batch
        self.optimizer.zero_grad(set_to_none=True)  # gradients are the graph's own
        losses, final = module.model.token_losses(
            batch["ids"],
            batch["targets"],
            self.inputs.state,
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

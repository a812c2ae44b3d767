"""The model as Lightning trains it: loss, optimizer, and metrics that do not depend on how a batch is cut."""

import gc
import math
import sys
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from conf.schema import TrainConfig
from kernels.context import Context
from kernels.cross_entropy import linear_cross_entropy
from lightning_modules.backbone import Mamba2LM
from lightning_modules.carried import Carried
from lightning_modules.dtypes import Dtypes, recurrence_dtypes
from lightning_modules.finite import (
    first_non_finite_gradient,
    first_non_finite_parameter,
    first_of_ranks,
    watch_forward,
)
from lightning_modules.gradient_norms import norms_by_group
from lightning_modules.graphs import CaptureError, GraphedLoss
from lightning_modules.initial_state import Batch, FittedNoise, InitialState, Noise, Passed, Rows
from lightning_modules.mitigations import build_mitigation
from lightning_modules.optim import build_optimizer, build_schedule
from lightning_modules.planning.estimate import why_eager
from lightning_modules.planning.measure import device_here
from lightning_modules.run_dir import RunError
from lightning_modules.segments import hidden_by_segments, segmented_losses
from lightning_modules.state import ModelState

INITIAL_STATES: dict[str, type[InitialState]] = {
    "zero": InitialState,
    "noise": Noise,
    "fitted_noise": FittedNoise,
    "passed": Passed,
    "carried": Carried,
}


class LanguageModel(pl.LightningModule):
    """Next-token training of a Mamba2LM.

    The loss of an optimizer step is sum(weight * nll) / sum(weight) over the step's tokens, on all ranks and
    in all micro-batches. The sum of the weights is known before the first micro-batch is read
    (data.batches.weigh_steps), and every micro-batch's loss is divided by it: accumulation and ranks give the
    big batch's gradient also where weights are uneven, as in packed documents, and however a strategy
    reduces, shards or clips gradients.
    """

    model: Mamba2LM

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        self.mitigation = build_mitigation(config.mitigation, config.model, length=config.data.train_length)
        self.initial_state = INITIAL_STATES[config.initial_state.name](config, self.mitigation)
        self.train_loss = self.grad_norm = math.nan  # of the last optimizer step
        self.grad_norms: dict[str, float] = {}  # by group of parameters, of the last step that is logged
        self.val_metrics: dict[str, float] = {}  # of the last validation
        self._sums: dict[str, Tensor] = {}
        self._micro_batches: list[tuple[Batch, ModelState | None]] = []
        self._step_weight = torch.ones(())  # of the optimizer step, on all ranks
        self.context: Context | None = None  # the ranks that share this one's rows
        self.eager_because: str | None = "no CUDA device"  # why micro-batches are no graphs; None: they are
        self._graphed: GraphedLoss | None = None

    def setup(self, stage: str) -> None:
        """Find the ranks of a 2-D mesh, data x context, that hold other pieces of this rank's rows; decide
        whether its micro-batches become CUDA graphs."""
        size, world = self.config.trainer.context_parallel, self.trainer.world_size
        if size > 1 and self.context is None:
            mesh = init_device_mesh(
                self.trainer.strategy.root_device.type,
                (world // size, size),
                mesh_dim_names=("data", "context"),
            )
            self.context = Context(mesh.get_group("context"))
        if stage == "fit" and self.trainer.strategy.root_device.type == "cuda":
            self.eager_because = why_eager(self.config, device_here(self.config, cpu=False))

    def configure_model(self) -> None:
        """Build the model once; initial weights depend on the seed alone.

        On the CPU, whose generator is the same everywhere: a strategy's own device would draw other numbers.
        """
        if "model" in self._modules:
            return
        torch.manual_seed(self.config.seed)
        with torch.device("cpu"):
            self.model = Mamba2LM(self.config.model)

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.config.optim)
        schedule = build_schedule(optimizer, self.config.optim, self.config.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        if self.eager_because is None:
            names = ("ids", "targets", "loss_weight", "document_starts")
            self._graphed = GraphedLoss(self._weighted_loss, list(self.parameters()), names)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """sum(weight * nll) of a micro-batch over the mean of the step's micro-batches' weights.

        The mean: Lightning divides by their number on this rank, strategies average over ranks.
        """
        part, count = len(self._micro_batches), len(batch["ids"])
        size = self.config.trainer.context_parallel
        first = (part * self.trainer.world_size + self.global_rank) // size * count
        rows = Rows(self.global_step, part, first, count)
        if part == 0:
            self._step_weight = self.trainer.strategy.reduce(batch["step_weight"].clone(), reduce_op="sum")
        state = self.initial_state.begin(self.model, batch, rows)
        loss, final = self._launch(batch, state)
        self.initial_state.end(batch, rows, final)
        self._add("loss", loss.detach())
        self._add("weight", batch["loss_weight"].sum())
        self._micro_batches.append((batch, None if state is None else state.detach()))
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size / self._step_weight)

    def _launch(self, batch: Batch, state: ModelState | None) -> tuple[Tensor, ModelState]:
        """`_weighted_loss`, as a graph where there may be one. Raises RunError if it was asked for and
        cannot be captured; else this rank goes on without, with one warning."""
        if self._graphed is not None:
            try:
                return self._graphed(batch, state)
            except CaptureError as error:
                self.eager_because = f"cannot be captured: {error}"
                if self.config.trainer.cuda_graphs:
                    raise RunError(f"trainer.cuda_graphs=true: {self.eager_because}; leave it out") from error
            except torch.OutOfMemoryError:
                if self.config.trainer.cuda_graphs:
                    raise
                self.eager_because = "no memory for them"
            self._graphed = None  # and what it holds goes back
            gc.collect()
            torch.cuda.empty_cache()
            print(
                f"warning: cuda graphs: off from step {self.global_step} on ({self.eager_because}); "
                "trainer.cuda_graphs=false says so from the start",
                file=sys.stderr,
                flush=True,
            )
        return self._weighted_loss(batch, state)

    def _weighted_loss(self, batch: Batch, state: ModelState | None) -> tuple[Tensor, ModelState]:
        """sum(weight * nll) of a micro-batch, and the state after it."""
        losses, final = segmented_losses(
            self.model,
            batch["ids"],
            batch["targets"],
            state,
            document_starts=batch.get("document_starts"),
            mitigation=self.mitigation,
            length=self.config.trainer.segment_length,
            truncate_after=self.config.trainer.truncate_after,
            context=self.context,
        )
        return (batch["loss_weight"] * losses).sum(), final

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Called once a step. Raises RunError if the loss is not finite."""
        sums = self._reduce_sums()
        self.train_loss = sums["loss"] / sums["weight"]
        if not math.isfinite(self.train_loss):
            raise self._non_finite(f"train loss is {self.train_loss}", self._micro_batches)
        self._micro_batches.clear()
        self.initial_state.end_step(self.trainer)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm and note it. Raises RunError if it is not finite."""
        parameters = list(self.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.note_gradient_norm(norm.item(), lambda: first_non_finite_gradient(self.model))
        if self.logs_this_step:
            named = self.model.named_parameters()
            self.grad_norms = norms_by_group((n, p.grad) for n, p in named if p.grad is not None)
        if gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    @property
    def logs_this_step(self) -> bool:
        """Whether the optimizer step at work will be logged."""
        return self.config.trainer.logs_at(self.global_step + 1)

    def note_gradient_norm(self, norm: float, locate: Callable[[], str | None]) -> None:
        """Take note of the global norm, the same on all ranks. Raises RunError if it is not finite.

        locate: finds the first gradient of this rank that is not finite.
        """
        self.grad_norm = norm
        if not math.isfinite(norm):
            where = first_of_ranks(locate()) or "the norm alone, which overflowed"
            raise RunError(f"after step {self.global_step}: gradient norm is {norm}; first there: {where}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["initial_state"] = self.initial_state.state_dict(self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.initial_state.load_state_dict(checkpoint.get("initial_state", {}), self.trainer)

    def on_validation_epoch_start(self) -> None:
        self._sums = {}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Sums for val/loss; for rows with an answer also whether each of its tokens is the likeliest."""
        answer, targets = batch["answer"], batch["targets"]
        losses, wrong = torch.empty(answer.shape, device=answer.device), torch.zeros_like(answer)
        pieces = hidden_by_segments(
            self.model,
            batch["ids"],
            document_starts=batch.get("document_starts"),
            mitigation=self.mitigation,
            length=self.config.trainer.segment_length,
            context=self.context,
        )
        for span, hidden in pieces:
            losses[:, span] = linear_cross_entropy(hidden, self.model.lm_head.weight, targets[:, span])
            asked = answer[:, span]
            guesses = F.linear(hidden[asked], self.model.lm_head.weight).argmax(-1)
            wrong[:, span][asked] = guesses != targets[:, span][asked]
        loss = (batch["loss_weight"] * losses).sum()
        self._add("loss", loss)
        self._add("weight", batch["loss_weight"].sum())
        total = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="sum").item()
        if not math.isfinite(total):  # on all ranks: they find out together
            raise self._non_finite(f"val/loss is {total}", [(batch, None)])
        self._add("digits", answer.sum())
        self._add("right_digits", answer.sum() - wrong.sum())
        rows, failed = answer.any(1), wrong.any(1)
        if self.context is not None:  # an answer may lie on several ranks: the first counts the rows
            shares = self.context.all_gather(torch.stack([rows, failed]).to(torch.uint8))
            rows, failed = shares.amax(0).bool() & (self.context.rank == 0)
        self._add("rows", rows.sum())
        self._add("right_rows", (rows & ~failed).sum())
        self._add("answer_loss", losses[answer].sum())

    def on_validation_epoch_end(self) -> None:
        sums = self._reduce_sums()
        self.val_metrics = {"val/loss": sums["loss"] / sums["weight"]}
        if sums["rows"]:
            self.val_metrics["val/exact"] = sums["right_rows"] / sums["rows"]
            self.val_metrics["val/digits"] = sums["right_digits"] / sums["digits"]
            self.val_metrics["val/answer_loss"] = sums["answer_loss"] / sums["digits"]
        # For callbacks that monitor a metric; our own logger gets them with the number of finished steps.
        self.log_dict(self.val_metrics, logger=False, sync_dist=True)

    def _add(self, name: str, value: Tensor) -> None:
        value = value.double()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _reduce_sums(self) -> dict[str, float]:
        """The sums over all ranks as floats, in one transfer; starts new ones."""
        names = sorted(self._sums)
        values = torch.stack([self._sums[name] for name in names])
        values = self.trainer.strategy.reduce(values, reduce_op="sum")
        self._sums = {}
        sums = dict(zip(names, values.tolist(), strict=True))
        if sums["weight"] == 0:
            raise RunError(f"after step {self.global_step}: no token of the batch has a loss weight")
        return sums

    def _non_finite(self, what: str, batches: list[tuple[Batch, ModelState | None]]) -> RunError:
        """The error that names the first tensor to blame: a parameter, or one that the forward pass makes."""
        where = first_non_finite_parameter(self.model)
        if where is None:
            run_inside = getattr(self.trainer.strategy, "run_inside", None)
            found = self.watch(batches) if run_inside is None else run_inside("watch", batches)
            where = first_of_ranks(found[0] if found else None) or "the loss itself"
        return RunError(f"after step {self.global_step}: {what}; first not finite: {where}")

    def recurrence_dtypes(self) -> list[Dtypes]:
        """What each layer computes in; all ranks call this together."""
        run_inside = getattr(self.trainer.strategy, "run_inside", None)
        return self.see_dtypes() if run_inside is None else run_inside("see_dtypes")

    def see_dtypes(self) -> list[Dtypes]:
        with self.trainer.precision_plugin.forward_context():
            return recurrence_dtypes(self.model, self.mitigation, self.context)

    def watch(self, batches: list[tuple[Batch, ModelState | None]]) -> list[str]:
        """Read micro-batches again and name the tensors that are not finite, in order of computation.

        All of them, whatever comes: ranks may have to gather parameters together.
        """
        precision = self.trainer.precision_plugin.forward_context()
        with torch.no_grad(), precision, watch_forward(self.model) as found:
            for batch, state in batches:
                self.model.token_losses(
                    batch["ids"],
                    batch["targets"],
                    state,
                    document_starts=batch.get("document_starts"),
                    mitigation=self.mitigation,
                )
        return found

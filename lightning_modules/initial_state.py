"""Where training rows begin: `initial_state.name` says which state stands before their first token.

The choices are the interventions of arXiv 2507.02782, section 4 (random noise, fitted noise, state passing,
truncated backpropagation through time): a model trained from zero alone meets few of the states that long
text attains. Validation and evaluation always begin at zero.

Only the SSM state is drawn or passed: the row is other text, so its convolution begins with no inputs, its
tokens are counted from 0, and a document start inside the row zeroes the state there as always. `carried`
(carried.py) goes on with the same text and therefore with the convolution's last inputs and the count too.

Random choices are pure functions of the seed, the optimizer step and the row's place among the step's rows:
they resume by themselves and, but for the shift of `Passed`, do not depend on the number of ranks. What
batches leave to the next ones is saved in checkpoints by row of the step.
"""

from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from conf.schema import TrainConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.finite import first_non_finite_state
from lightning_modules.mitigations import AnyMitigation
from lightning_modules.run_dir import RunError
from lightning_modules.state import LayerState, ModelState
from lightning_modules.step_rows import gather_rows, own_rows

Batch = dict[str, Tensor]
RESET, SHIFT, NOISE = 2, 3, 4  # second number of a seed; data/batches.py has 0 and 1
MOMENTUM = 0.1  # weight of a step's moments in the running ones: they follow weights that still change


@dataclass(frozen=True)
class Rows:
    """Which of an optimizer step's rows a micro-batch holds: `count` from `first`, over ranks and parts."""

    step: int
    part: int  # number of the micro-batch on its rank
    first: int
    count: int


class InitialState:
    """zero: every row begins with nothing. Also what all kinds share."""

    def __init__(self, config: TrainConfig, mitigation: AnyMitigation) -> None:
        self.seed, self.model, self.mitigation = config.seed, config.model, mitigation
        self.reset_probability = config.initial_state.reset_probability

    def begin(self, model: Mamba2LM, batch: Batch, rows: Rows) -> ModelState | None:
        """The state before the micro-batch's first tokens; None for zero. `model` reads what comes before."""
        return None

    def end(self, batch: Batch, rows: Rows, final: ModelState) -> None:
        """Take note of the state after the micro-batch's last tokens."""

    def end_step(self, trainer: pl.Trainer) -> None:
        """Called on all ranks once a step's micro-batches are through."""

    def state_dict(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Plain data for a checkpoint, the same on all ranks, which call this together.

        Raises RunError if a state to be saved is not finite.
        """
        return {}

    def load_state_dict(self, saved: dict[str, Any], trainer: pl.Trainer) -> None:
        """Take up what `state_dict` returned, perhaps on another number of ranks."""

    def zeros(self, count: int, device: torch.device | str) -> ModelState:
        return ModelState.zeros(self.model, count, device, torch.float32, self.mitigation)

    def resets(self, rows: Rows, device: torch.device) -> Tensor:
        """(count,) bool: the rows that begin at zero by chance."""
        generator = np.random.default_rng([self.seed, RESET, rows.step])
        chosen = generator.random(rows.first + rows.count)[rows.first :] < self.reset_probability
        return torch.from_numpy(chosen).to(device)

    def save_states(self, states: list[ModelState], trainer: pl.Trainer) -> list[Tensor]:
        """The states of this rank's micro-batches and of the other ranks', tensor by tensor."""
        parts = zip(*(state.tensors() for state in states), strict=True)
        tensors = [gather_rows(list(part), trainer) for part in parts]
        where = first_non_finite_state(states[0].with_tensors(tensors))
        if where is not None:
            raise RunError(f"after step {trainer.global_step}: not finite: {where}; nothing saved")
        return tensors

    def load_states(self, tensors: list[Tensor], trainer: pl.Trainer) -> list[ModelState]:
        """The inverse of `save_states`: one state a micro-batch of this rank."""
        kind = self.zeros(1, "meta")
        parts = zip(*(own_rows(tensor, trainer) for tensor in tensors), strict=True)
        return [kind.with_tensors(part) for part in parts]


class Noise(InitialState):
    """noise: every element ~ N(0, std^2), one std for all layers and heads. The crudest choice: the paper
    reports that it fails where heads' states differ in size (370M parameters)."""

    def __init__(self, config: TrainConfig, mitigation: AnyMitigation) -> None:
        super().__init__(config, mitigation)
        self.std = config.initial_state.std

    def moments(self, device: torch.device) -> Tensor | None:
        """Mean and standard deviation of every head, (2, layers, heads) fp32; None while unknown."""
        assert self.std is not None
        shape = (self.model.n_layers, self.model.n_heads)
        return torch.stack([torch.zeros(shape, device=device), torch.full(shape, self.std, device=device)])

    def begin(self, model: Mamba2LM, batch: Batch, rows: Rows) -> ModelState | None:
        device = batch["ids"].device
        moments = self.moments(device)
        if moments is None:
            return None
        mean, std = moments[:, :, None, :, None, None]
        noise = torch.stack([self._draw(rows.step, rows.first + i, device) for i in range(rows.count)], 1)
        zero = self.zeros(rows.count, device)
        pairs = zip(zero.layers, mean + std * noise, strict=True)
        state = replace(zero, layers=tuple(LayerState(conv=layer.conv, ssm=ssm) for layer, ssm in pairs))
        return state.zero_rows(self.resets(rows, device))

    def _draw(self, step: int, row: int, device: torch.device) -> Tensor:
        """N(0, 1) for one row, (layers, heads, headdim, d_state)."""
        c = self.model
        (word,) = np.random.SeedSequence([self.seed, NOISE, step, row]).generate_state(1, np.uint64)
        generator = torch.Generator(device=device).manual_seed(int(word >> np.uint64(1)))
        shape = (c.n_layers, c.n_heads, c.headdim, c.d_state)
        return torch.randn(shape, generator=generator, device=device)


class FittedNoise(Noise):
    """fitted_noise: N(mean, std^2) with mean and standard deviation, per layer and head, of the final states
    seen in training: running averages of the first two moments, one update a step, over all rows and ranks.
    Zero in the first step."""

    def __init__(self, config: TrainConfig, mitigation: AnyMitigation) -> None:
        super().__init__(config, mitigation)
        self.running: Tensor | None = None  # E[h], E[h^2]: (2, layers, heads) fp64
        self._parts: list[Tensor] = []

    def moments(self, device: torch.device) -> Tensor | None:
        if self.running is None:
            return None
        mean, square = self.running = self.running.to(device)
        return torch.stack([mean, (square - mean.square()).clamp(min=0).sqrt()]).float()

    def end(self, batch: Batch, rows: Rows, final: ModelState) -> None:
        moments = []
        for layer in final.layers:
            assert isinstance(layer.ssm, Tensor)
            ssm = layer.ssm.detach()
            moments.append(torch.stack([ssm.mean((0, 2, 3)), ssm.square().mean((0, 2, 3))]))
        self._parts.append(torch.stack(moments, 1))

    def end_step(self, trainer: pl.Trainer) -> None:
        new = torch.stack(self._parts).double().mean(0)
        self._parts.clear()
        if trainer.world_size > 1:
            new = trainer.strategy.reduce(new, reduce_op="mean")
        self.running = new if self.running is None else torch.lerp(self.running, new, MOMENTUM)

    def state_dict(self, trainer: pl.Trainer) -> dict[str, Any]:
        return {} if self.running is None else {"moments": self.running.cpu()}

    def load_state_dict(self, saved: dict[str, Any], trainer: pl.Trainer) -> None:
        self.running = saved.get("moments")


class Passed(InitialState):
    """passed: the final state of another row of the same micro-batch a step before, detached (state passing).

    Rows move round by a random number of places, so none begins where its own text may have left off. A shift
    within the rank's micro-batch needs no communication; another number of ranks shifts other rows.
    """

    def __init__(self, config: TrainConfig, mitigation: AnyMitigation) -> None:
        super().__init__(config, mitigation)
        self.last: dict[int, ModelState] = {}  # final states by number of the micro-batch

    def begin(self, model: Mamba2LM, batch: Batch, rows: Rows) -> ModelState | None:
        if rows.part not in self.last:
            return None
        device = batch["ids"].device
        state = self.last[rows.part].to(device)
        available = state.batch_size  # more than count where a curriculum's rows grow longer
        generator = np.random.default_rng([self.seed, SHIFT, rows.step])
        shift = int(generator.integers(1, available)) if available > 1 else 0
        index = (torch.arange(rows.count, device=device) + shift) % available
        return state.rows(index).zero_rows(self.resets(rows, device))

    def end(self, batch: Batch, rows: Rows, final: ModelState) -> None:
        self.last[rows.part] = final.detach().ssm_only()

    def state_dict(self, trainer: pl.Trainer) -> dict[str, Any]:
        return {"states": self.save_states([state for _, state in sorted(self.last.items())], trainer)}

    def load_state_dict(self, saved: dict[str, Any], trainer: pl.Trainer) -> None:
        self.last = dict(enumerate(self.load_states(saved["states"], trainer)))

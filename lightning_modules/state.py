"""The recurrent state: what one function that consumes tokens hands to the next."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conf.schema import ModelConfig
from kernels.ssd import Window, map_state, zero_state
from lightning_modules.mitigations import AnyMitigation, for_layers


@dataclass(frozen=True)
class LayerState:
    """conv: the last inputs of the convolution, (B, channels, d_conv - 1). ssm: (B, H, P, N) fp32, or what
    the mitigation in force keeps in its place: under sliding_window the last tokens."""

    conv: Tensor
    ssm: Tensor | Window

    def tensors(self) -> tuple[Tensor, ...]:
        return self.conv, *([self.ssm] if isinstance(self.ssm, Tensor) else self.ssm)


@dataclass(frozen=True)
class ModelState:
    """State of every layer, tokens seen by each row since its document began, and the mitigation in force."""

    layers: tuple[LayerState, ...]
    position: Tensor  # (B,) int64
    mitigation: str = "none"

    @classmethod
    def zeros(
        cls,
        config: ModelConfig,
        batch: int,
        device: torch.device | str,
        dtype: torch.dtype,
        mitigation: AnyMitigation,
    ) -> "ModelState":
        """The state before the first token; dtype: what the model computes in."""
        conv_shape = (batch, config.conv_dim, config.d_conv - 1)
        ssm_shape = (batch, config.n_heads, config.headdim, config.n_groups, config.d_state)
        rules = for_layers(mitigation, config.n_layers)
        layers = tuple(
            LayerState(
                conv=torch.zeros(conv_shape, device=device, dtype=dtype),
                ssm=zero_state(rule, *ssm_shape, dtype=dtype, device=device),
            )
            for rule in rules.layers
        )
        return cls(layers, torch.zeros(batch, dtype=torch.int64, device=device), rules.key)

    @property
    def batch_size(self) -> int:
        return len(self.position)

    def require(self, mitigation: str, batch: int) -> None:
        """Refuse to continue under another mitigation or with another number of rows."""
        if self.mitigation != mitigation:
            raise ValueError(
                f"state belongs to mitigation {self.mitigation!r}, the call uses {mitigation!r}: "
                "start from a new state"
            )
        if self.batch_size != batch:
            raise ValueError(f"state has {self.batch_size} rows, the batch {batch}: they must agree")

    def detach(self) -> "ModelState":
        """The same values, cut from the graph that computed them."""
        return self._map(Tensor.detach)

    def rows(self, index: Tensor) -> "ModelState":
        """Select or repeat rows; `index` (n,) int64."""
        return self._map(lambda t: t.index_select(0, index))

    def zero_rows(self, rows: Tensor) -> "ModelState":
        """These rows, `rows` (B,) bool, as before their first token."""
        return self._map(lambda t: t.masked_fill(rows.view(-1, *(1,) * (t.dim() - 1)), 0))

    def ssm_only(self) -> "ModelState":
        """What a row of other text may begin with: the SSM states; no inputs of a convolution, position 0."""
        layers = tuple(replace(layer, conv=torch.zeros_like(layer.conv)) for layer in self.layers)
        return replace(self, layers=layers, position=torch.zeros_like(self.position))

    def to(self, device: torch.device | str) -> "ModelState":
        return self._map(lambda t: t.to(device))

    @property
    def nbytes(self) -> int:
        """What all rows together take."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Every tensor, rows first: layer after layer, then the position."""
        return [*(t for layer in self.layers for t in layer.tensors()), self.position]

    def with_tensors(self, tensors: Iterable[Tensor]) -> "ModelState":
        """A state of this kind made of other tensors, in the order of `tensors()`."""
        values = iter(tensors)
        return self._map(lambda _: next(values))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "ModelState":
        layers = tuple(LayerState(conv=function(s.conv), ssm=map_state(function, s.ssm)) for s in self.layers)
        return replace(self, layers=layers, position=function(self.position))

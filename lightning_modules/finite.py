"""Where a computation first stopped being finite."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from kernels.ssd import ssd_scan
from lightning_modules.layer import Mamba2, scanning_with
from lightning_modules.state import ModelState


def first_non_finite_gradient(model: nn.Module) -> str | None:
    """The non-finite gradient nearest to the loss: backward runs from the last parameter to the first."""
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name}"
    return None


def first_non_finite_parameter(model: nn.Module) -> str | None:
    """All ranks call this together: under ZeRO-3 each looks at its own share."""
    found = None
    for name, parameter in model.named_parameters():
        share: Tensor = getattr(parameter, "ds_tensor", parameter)
        if found is None and not share.isfinite().all():
            found = f"parameter {name}"
    return first_of_ranks(found)


def first_non_finite_state(state: ModelState) -> str | None:
    """The first layer and row whose recurrent state is not finite."""
    for number, layer in enumerate(state.layers):
        for tensor in layer.tensors():
            rows = (~tensor.isfinite()).flatten(1).any(1).nonzero()
            if len(rows):
                return f"the state of layer {number} in row {int(rows[0])}"
    return None


class GradientWatch:
    """Remembers the sum of every gradient of a step, which is not finite where the gradient is not.

    For strategies that take gradients away as soon as they are made.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def start(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.register_hook(partial(self._add, name))

    def clear(self) -> None:
        self._sums = {}

    def first_non_finite(self) -> str | None:
        """As `first_non_finite_gradient`: sums come in the order of the backward pass."""
        for name, value in self._sums.items():
            if not value.isfinite():
                return f"the gradient of {name}"
        return None

    def _add(self, name: str, gradient: Tensor) -> None:
        value = gradient.detach().sum()
        self._sums[name] = self._sums[name] + value if name in self._sums else value


def first_of_ranks(found: str | None) -> str | None:
    """What the first rank that found anything found; all ranks call this together."""
    if not dist.is_initialized():
        return found
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return next((one for one in everyone if one is not None), None)


@contextmanager
def watch_forward(model: nn.Module) -> Iterator[list[str]]:
    """Within the block, record modules' inputs and outputs that are not finite, in order of computation.

    The list's first entry names the culprit: a module's input that is not finite while all before it was,
    such as that of `norm`, was made by a function between the modules, such as the scan.
    """
    found: list[str] = []

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        if any(not tensor.isfinite().all() for tensor in _floats(arguments)):
            found.append(f"the input of {name}")

    def after(name: str, output: Any) -> None:
        if any(not tensor.isfinite().all() for tensor in _floats(output)):
            found.append(f"the output of {name}")

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: before(name, args)))
            handles.append(module.register_forward_hook(lambda _, __, out, name=name: after(name, out)))
    # One operator after another: between the parts of a fused one are no modules.
    mixers = [m for m in model.modules() if isinstance(m, Mamba2) and m.scan is None]
    try:
        with scanning_with(mixers, [ssd_scan] * len(mixers)):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def _floats(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested tuples, lists and dataclasses."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _floats(item)
    elif hasattr(value, "__dataclass_fields__"):
        for field in value.__dataclass_fields__:
            yield from _floats(getattr(value, field))

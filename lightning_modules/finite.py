"""Where a computation first stopped being finite."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_modules.state import ModelState


def first_non_finite_gradient(model: nn.Module) -> str | None:
    """The non-finite gradient nearest to the loss: backward runs from the last parameter to the first."""
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name}"
    return None


def first_non_finite_parameter(model: nn.Module) -> str | None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"parameter {name}"
    return None


def first_non_finite_state(state: ModelState) -> str | None:
    """The first layer and row whose recurrent state is not finite."""
    for number, layer in enumerate(state.layers):
        for tensor in layer.tensors():
            rows = (~tensor.isfinite()).flatten(1).any(1).nonzero()
            if len(rows):
                return f"the state of layer {number} in row {int(rows[0])}"
    return None


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
    try:
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

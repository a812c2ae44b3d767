"""What our wrappers would launch on a GPU, recorded on a machine that has none.

Wrappers see CPU tensors that claim to be on a GPU; nothing is computed, as every launch is noted instead.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch.overrides import TorchFunctionMode

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
ALIGNMENT = 16  # Triton compiles separately for pointers and sizes that are multiples of this


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel: what `triton.compile` needs."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def settings(self) -> str:
        """Launch settings and the constants that are numbers above 1: block sizes and the like."""
        sizes = [f"{n}={v}" for n, v in self.constants if type(v) is int and v > 1]
        return " ".join([*sizes, *(f"{n.removeprefix('num_')}={v}" for n, v in self.options)])


class AsIfOnGPU(TorchFunctionMode):
    """Tensors say that they are on a GPU, and random ones are left unfilled."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if function in (torch.randn, torch.randn_like):
            function = {torch.randn: torch.empty, torch.randn_like: torch.empty_like}[function]
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Yields a list that gathers what is launched inside, each specialisation once."""
    found: dict[Launch, None] = {}
    launches: list[Launch] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = specialise(kernel, *args, **kwargs)
        if launch not in found:
            found[launch] = None
            launches.append(launch)

    jit = mock.patch.object(triton.runtime.jit.JITFunction, "run", note)
    device = mock.patch("torch.cuda.device", return_value=contextlib.nullcontext())
    with jit, device, AsIfOnGPU():
        yield launches


def specialise(kernel: Any, *args: Any, **kwargs: Any) -> Launch:
    """The specialisation that Triton's launcher would choose: `None`, ones and constexprs are constants,
    pointers and integers that are multiples of 16 are marked, `do_not_specialize` is obeyed."""
    known = kernel.signature.parameters
    bound = kernel.signature.bind(*args, **{n: v for n, v in kwargs.items() if n in known})
    bound.apply_defaults()
    signature, constants, aligned = {}, {}, []
    for parameter, value in zip(kernel.params, bound.arguments.values(), strict=True):
        name, free = parameter.name, not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (free and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", getattr(value, "value", value)
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % ALIGNMENT == 0:
                aligned.append(name)
        elif hasattr(value, "block_shape"):  # a descriptor of a tensor, which TMA reads by tiles
            kind, block = TYPES[value.base.dtype], list(value.block_shape)
            signature[name] = f"tensordesc<{kind}{block},{value.layout!r}>"
        elif isinstance(value, bool | int | float):
            signature[name] = parameter.annotation_type or _scalar(value)
            if free and type(value) is int and value % ALIGNMENT == 0:
                aligned.append(name)
        else:
            raise TypeError(
                f"{kernel.fn.__name__}: {name} is a {type(value).__name__}: not a tensor or number"
            )
    options = {n: v for n, v in kwargs.items() if n not in known}
    parts = (signature.items(), constants.items(), aligned, options.items())
    return Launch(kernel, *map(tuple, parts))


def _scalar(value: float) -> str:
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"

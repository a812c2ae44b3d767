"""What the recurrence is computed in, seen on a few tokens: asserted before anything is trained.

Parameters may be fp32 and the states they make not, or the decays: autocast decides that at every operator.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.context import Context
from kernels.ssd import Window, ssd_scan
from kernels.ssd.discretize import discretize
from kernels.ssd.heads import spread
from lightning_modules.backbone import Mamba2LM
from lightning_modules.layer import scanning_with
from lightning_modules.mitigations import AnyMitigation
from lightning_modules.run_dir import RunError

TOKENS = 16
FP32 = ("A", "D", "dt_bias", "decays", "states")  # in bf16 a retention of 0.999 is 1: nothing is forgotten

Dtypes = dict[str, torch.dtype]


@torch.no_grad()
def recurrence_dtypes(
    model: Mamba2LM, mitigation: AnyMitigation, context: Context | None = None
) -> list[Dtypes]:
    """What each layer computes in, by name: reads TOKENS tokens under the autocast in force.

    With a context group, whose ranks call this together, it then reads as many on each, as one sequence.
    """
    mixers: list[Any] = [layer.mixer for layer in model.backbone.layers]
    layers: list[Dtypes] = [{} for _ in mixers]
    ids = torch.zeros(1, TOKENS, dtype=torch.int64, device=model.lm_head.weight.device)
    with scanning_with(mixers, (partial(_scan, found) for found in layers)):
        _, state = model.hidden(ids, mitigation=mitigation)
    if context is not None:
        _, sharded = model.hidden(ids, state, mitigation=mitigation, context=context)
        for layer, found in zip(sharded.layers, layers, strict=True):
            found["states"] = min(found["states"], _narrowest(layer.ssm), key=_bytes)
    return layers


def require_fp32(layers: list[Dtypes]) -> str:
    """One line that says what is in which dtype. Raises RunError (one line) unless all of FP32 is fp32."""
    for number, found in enumerate(layers):
        for name in FP32:
            if found[name] != torch.float32:
                raise RunError(f"layer {number}: {name} in {str(found[name])[6:]}: must be float32")
    names: dict[str, list[str]] = {}
    for name in layers[0]:
        dtypes = sorted({str(found[name])[6:] for found in layers})
        names.setdefault(" or ".join(dtypes), []).append(name)
    return "; ".join(f"{', '.join(some)} {dtype}" for dtype, some in names.items())


def _scan(found: Dtypes, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any) -> Any:
    """`ssd_scan`, and what it is given and makes of it."""
    y, state = ssd_scan(x, dt, A, B, C, **options)
    rule = spread(options["mitigation"], x.shape[2], x.device)
    # The decays of the PyTorch scans; Triton's make the same of A in registers, where nothing but fp32 is.
    decays = discretize(dt, A, options["dt_bias"], options["dt_softplus"], options["dt_limit"], rule)
    found |= {
        "A": A.dtype,
        "D": options["D"].dtype,
        "dt_bias": options["dt_bias"].dtype,
        "decays": _narrowest(*decays),
        "states": _narrowest(state),
        "x, B, C": _narrowest(x, B, C),
    }
    return y, state


def _narrowest(*values: Any) -> torch.dtype:
    """Of some tensors or states; a window's tokens are no state, only their decays and weights are."""
    tensors: list[Tensor] = []
    for value in values:
        tensors += [value.log_decay, value.insert, value.rest] if isinstance(value, Window) else [value]
    return min((tensor.dtype for tensor in tensors), key=_bytes)


def _bytes(dtype: torch.dtype) -> int:
    return dtype.itemsize

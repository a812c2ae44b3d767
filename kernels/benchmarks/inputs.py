"""Random inputs of each operator in bf16, laid out as the layer lays them out or each on its own."""

import math
from typing import Any

import torch
from torch import Tensor

from conf.schema import ModelConfig
from kernels.benchmarks.shapes import VOCABULARY, Shape

Inputs = dict[str, Any]  # tensors by the operator's argument names; "module" is the layer
BF16 = torch.bfloat16


def projection(shape: Shape, device: str) -> dict[str, Tensor]:
    """z, xBC and dt as in_proj leaves them: views of one (B, T, d_in_proj)."""
    widths = [shape.d_inner, shape.conv_dim, shape.heads]
    whole = torch.randn(shape.batch, shape.length, shape.d_in_proj, device=device, dtype=BF16)
    return dict(zip(("z", "xBC", "dt"), whole.split(widths, -1), strict=True))


def scan_inputs(shape: Shape, device: str) -> Inputs:
    """x (B, T, H, P), dt (B, T, H) before softplus, B and C (B, T, G, N), A, D and dt_bias (H,) fp32."""
    tokens, heads, groups = (shape.batch, shape.length), shape.heads, shape.groups
    if shape.layout == "sliced":
        dt = projection(shape, device)["dt"]
        conv = torch.randn(*tokens, shape.conv_dim, device=device, dtype=BF16)
        x, B, C = conv.split([shape.d_inner, groups * shape.d_state, groups * shape.d_state], -1)
        x, B, C = x.unflatten(-1, (heads, -1)), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))
    else:
        dt = torch.randn(*tokens, heads, device=device, dtype=BF16)
        x = torch.randn(*tokens, heads, shape.headdim, device=device, dtype=BF16)
        B, C = (torch.randn(*tokens, groups, shape.d_state, device=device, dtype=BF16) for _ in range(2))
    return {"x": x, "dt": dt, "B": B, "C": C} | head_parameters(heads, device)


def head_parameters(heads: int, device: str) -> Inputs:
    """A, D and dt_bias at Mamba-2's initial values: A in [-16, -1], dt between 0.001 and 0.1."""
    dt = torch.linspace(math.log(1e-3), math.log(1e-1), heads, device=device).exp()
    return {
        "A": -torch.linspace(1.0, 16.0, heads, device=device).flip(0),
        "D": torch.ones(heads, device=device),
        "dt_bias": dt + torch.log(-torch.expm1(-dt)),
    }


def step_inputs(shape: Shape, device: str) -> Inputs:
    """One token: state (B, H, P, N) fp32, x (B, H, P), dt (B, H), B and C (B, G, N)."""
    batch, heads, groups = shape.batch, shape.heads, shape.groups
    return {
        "state": torch.randn(batch, heads, shape.headdim, shape.d_state, device=device),
        "x": torch.randn(batch, heads, shape.headdim, device=device, dtype=BF16),
        "dt": torch.randn(batch, heads, device=device, dtype=BF16),
        "B": torch.randn(batch, groups, shape.d_state, device=device, dtype=BF16),
        "C": torch.randn(batch, groups, shape.d_state, device=device, dtype=BF16),
    } | head_parameters(heads, device)


def conv_inputs(shape: Shape, device: str) -> Inputs:
    """x (B, T, C), weight (C, 4), bias (C,)."""
    channels = shape.conv_dim
    if shape.layout == "sliced":
        x = projection(shape, device)["xBC"]
    else:
        x = torch.randn(shape.batch, shape.length, channels, device=device, dtype=BF16)
    weight = torch.randn(channels, 4, device=device, dtype=BF16) / 2
    return {"x": x, "weight": weight, "bias": torch.randn(channels, device=device, dtype=BF16)}


def norm_inputs(shape: Shape, device: str) -> Inputs:
    """x and z (B, T, d_inner), weight (d_inner,) fp32."""
    x, z = (
        torch.randn(shape.batch, shape.length, shape.d_inner, device=device, dtype=BF16) for _ in range(2)
    )
    if shape.layout == "sliced":
        z = projection(shape, device)["z"]
    return {"x": x, "z": z, "weight": 1 + torch.randn(shape.d_inner, device=device) / 10}


def add_norm_inputs(shape: Shape, device: str) -> Inputs:
    """residual (B, T, d_model) fp32, branch the same in bf16, weight (d_model,) fp32."""
    stream = torch.randn(shape.batch, shape.length, shape.d_model, device=device)
    weight = 1 + torch.randn(shape.d_model, device=device) / 10
    return {"residual": stream, "branch": torch.randn_like(stream, dtype=BF16), "weight": weight}


def head_inputs(shape: Shape, device: str) -> Inputs:
    """hidden (B, T, d_model), weight (VOCABULARY, d_model), targets (B, T)."""
    tokens, scale = (shape.batch, shape.length), shape.d_model**-0.5
    return {
        "hidden": torch.randn(*tokens, shape.d_model, device=device, dtype=BF16),
        "weight": torch.randn(VOCABULARY, shape.d_model, device=device, dtype=BF16) * scale,
        "targets": torch.randint(VOCABULARY, tokens, device=device),
    }


def layer_inputs(shape: Shape, device: str) -> Inputs:
    """u (B, T, d_model) and the `Mamba2` module: projections and convolution bf16, the rest fp32."""
    from lightning_modules.layer import Mamba2

    config = layer_config(shape)
    module = Mamba2(config).to(device)
    for part in (module.in_proj, module.conv1d, module.out_proj):
        part.to(BF16)
    u = torch.randn(shape.batch, shape.length, config.d_model, device=device, dtype=BF16)
    return {"u": u, "module": module}


def layer_config(shape: Shape) -> ModelConfig:
    return ModelConfig(
        d_model=shape.d_model,
        n_layers=1,
        d_state=shape.d_state,
        headdim=shape.headdim,
        n_groups=shape.groups,
    )


def leaves(inputs: Inputs) -> dict[str, Tensor]:
    """Everything that a training step takes the gradient of, by name."""
    tensors = {name: t for name, t in inputs.items() if _differentiable(t)}
    return tensors | dict(inputs["module"].named_parameters() if "module" in inputs else ())


def with_gradients(inputs: Inputs) -> Inputs:
    """The same memory as leaves of a graph: slices stay slices, and their gradients are their own."""
    return {n: t.detach().requires_grad_() if _differentiable(t) else t for n, t in inputs.items()}


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def cotangent(inputs: Inputs) -> Tensor:
    """A random gradient of the shape of u, x, the residual stream or hidden: of the first output."""
    like = next(inputs[name] for name in ("u", "x", "residual", "hidden") if name in inputs)
    return torch.randn_like(like, memory_format=torch.contiguous_format)


def size(inputs: Inputs) -> int:
    """Bytes of the inputs, as read; slices count for themselves."""
    return sum(t.numel() * t.element_size() for t in leaves(inputs).values())

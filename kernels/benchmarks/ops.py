"""The operators that are measured: inputs, our public function, the oracle, cost. `X_backward` is forward and
backward of X together, as a training step runs them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.benchmarks import costs, inputs
from kernels.benchmarks.costs import Cost
from kernels.benchmarks.inputs import Inputs
from kernels.benchmarks.shapes import LAYOUTS, LONG_AND_WIDE, SCAN, STEP, Layout, Shape

Outputs = tuple[Tensor, ...]
Run = Callable[[Inputs], Outputs]

# Settings of the mitigations. Norms of these inputs' states are about MAX_NORM: some are clipped.
MAX_NORM, EVERY, WINDOW = 5.0, 64, 4096


def _of_the_first(given: Inputs, dy: Tensor) -> Outputs:
    return (dy,)


@dataclass(frozen=True)
class Op:
    """inputs: of a shape, on a device. ours: inputs -> outputs. oracle: the same in float64, from float64
    inputs. starts: inputs and a random tensor -> gradients of the first outputs, where the backward pass
    starts. graph: timed inside a CUDA graph, as decoding runs."""

    name: str
    inputs: Callable[[Shape, str], Inputs]
    ours: Run
    oracle: Run
    cost: Callable[[Shape], Cost]
    shapes: tuple[Shape, ...]
    layouts: tuple[Layout, ...] = LAYOUTS
    backward: bool = False
    starts: Callable[[Inputs, Tensor], Outputs] = _of_the_first
    graph: bool = False

    @property
    def base(self) -> str:
        """The operator's name without `_backward`: what peers are listed under."""
        return self.name.removesuffix("_backward")

    def call(self, run: Run) -> "Plain | Differentiated":
        """`run` without gradients, or with its backward pass: then those of all leaves follow the outputs."""
        return Differentiated(run, self.starts) if self.backward else Plain(run)


@dataclass(frozen=True)
class Plain:
    """outputs of inputs."""

    run: Run

    def prepared(self, given: Inputs, dy: Tensor) -> Inputs:
        return given

    def __call__(self, given: Inputs) -> Outputs:
        with torch.no_grad():
            return self.run(given)


@dataclass(frozen=True)
class Differentiated:
    """outputs and gradients of inputs and `dy`."""

    run: Run
    starts: Callable[[Inputs, Tensor], Outputs]

    def prepared(self, given: Inputs, dy: Tensor) -> Inputs:
        """Leaves that record gradients, and the gradients of the first outputs."""
        return inputs.with_gradients(given) | {"dy": self.starts(given, dy)}

    def __call__(self, given: Inputs) -> Outputs:
        dy = given["dy"]
        given = {name: value for name, value in given.items() if name != "dy"}
        outputs = self.run(given)
        gradients = torch.autograd.grad(outputs[: len(dy)], list(inputs.leaves(given).values()), dy)
        return *(t.detach() for t in outputs), *gradients


def _scan(given: Inputs, **options: Any) -> Outputs:
    from kernels.ssd import ssd_scan

    return ssd_scan(**given, dt_softplus=True, **options)


def _naive_scan(given: Inputs, **options: Any) -> Outputs:
    return _scan(given, backend="naive", **options)


def _state_norm(given: Inputs, **options: Any) -> Outputs:
    from kernels.ssd import Mitigation

    clipped = Mitigation(name="state_norm", max_norm=MAX_NORM, every=EVERY)
    return _scan(given, mitigation=clipped, **options)


def _window(given: Inputs, **options: Any) -> Outputs:
    """y alone: the state is a window of tokens, views of the inputs."""
    from kernels.ssd import Mitigation

    window = min(WINDOW, max(1, given["x"].shape[1] // 4))
    return _scan(given, mitigation=Mitigation(name="sliding_window", window=window), **options)[:1]


def _step(given: Inputs) -> Outputs:
    from kernels.ssd.step import ssd_step

    y = ssd_step(**given, dt_softplus=True)
    return y, given["state"]


def _naive_step(given: Inputs) -> Outputs:
    token = {name: given[name][:, None] for name in ("x", "dt", "B", "C")}
    rest = {name: given[name] for name in ("A", "D", "dt_bias")}
    y, state = _naive_scan(token | rest | {"initial_state": given["state"]})
    return y[:, 0], state


def _conv(given: Inputs) -> Outputs:
    from kernels.conv import causal_conv1d

    return causal_conv1d(**given)[:1]


def _naive_conv(given: Inputs) -> Outputs:
    from kernels.conv.naive import naive_causal_conv1d

    return naive_causal_conv1d(**given)[:1]


def _norm(given: Inputs) -> Outputs:
    from kernels.norm import gated_rms_norm

    return (gated_rms_norm(**given, eps=1e-5),)


def _naive_norm(given: Inputs) -> Outputs:
    from kernels.norm import naive_gated_rms_norm

    return (naive_gated_rms_norm(**given, eps=1e-5),)


def _add_norm(given: Inputs) -> Outputs:
    from kernels.norm import add_rms_norm

    return add_rms_norm(**given, eps=1e-5, dtype=given["branch"].dtype)


def _naive_add_norm(given: Inputs) -> Outputs:
    total = given["residual"] + given["branch"]
    return total, total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * given["weight"]


def _of_sum_and_norm(given: Inputs, dy: Tensor) -> Outputs:
    return dy, dy.to(given["branch"].dtype)


def _head(given: Inputs) -> Outputs:
    from kernels.cross_entropy import linear_cross_entropy

    return (linear_cross_entropy(**given),)


def whole_head(given: Inputs) -> Outputs:
    """All logits at once, in fp32 or more."""
    logits = F.linear(given["hidden"], given["weight"]).flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, given["targets"].flatten(), reduction="none")
    return (losses.view_as(given["targets"]),)


def _of_losses(given: Inputs, dy: Tensor) -> Outputs:
    return (dy[..., 0].to(torch.promote_types(dy.dtype, torch.float32)),)


def _layer(given: Inputs) -> Outputs:
    from kernels.ssd import Mitigation
    from lightning_modules.state import ModelState

    module, u, none = given["module"], given["u"], Mitigation()
    state = ModelState.zeros(module.config, len(u), u.device, u.dtype, none)
    return module(u, state.layers[0], None, state.position, none)[:1]


def _naive_layer(given: Inputs) -> Outputs:
    """The layer's equations on the oracles, with the module's parameters in float64."""
    module, c = given["module"], given["module"].config
    z, xBC, dt = (given["u"] @ module.in_proj.weight.T).split([c.d_inner, c.conv_dim, c.n_heads], -1)
    (xBC,) = _naive_conv({"x": xBC, "weight": module.conv1d.weight[:, 0], "bias": module.conv1d.bias})
    x, B, C = xBC.split([c.d_inner, c.n_groups * c.d_state, c.n_groups * c.d_state], -1)
    scanned = {"x": x.unflatten(-1, (c.n_heads, -1)), "dt": dt, "A": -module.A_log.exp(), "D": module.D}
    scanned |= {name: t.unflatten(-1, (c.n_groups, -1)) for name, t in (("B", B), ("C", C))}
    y = _naive_scan(scanned | {"dt_bias": module.dt_bias})[0].flatten(2)
    (normal,) = _naive_norm({"x": y, "z": z, "weight": module.norm.weight})
    return (normal @ module.out_proj.weight.T,)


def _pair(
    name: str, forward: Callable[[Shape], Cost], backward: Callable[[Shape], Cost], **rest: Any
) -> list[Op]:
    def both(shape: Shape) -> Cost:
        return forward(shape) + backward(shape)

    return [Op(name, cost=forward, **rest), Op(f"{name}_backward", cost=both, backward=True, **rest)]


def _scan_pair(name: str, run: Callable[..., Outputs], shapes: tuple[Shape, ...]) -> list[Op]:
    def oracle(given: Inputs) -> Outputs:
        return run(given, backend="naive")

    return _pair(
        name,
        costs.scan,
        costs.scan_backward,
        inputs=inputs.scan_inputs,
        ours=run,
        oracle=oracle,
        shapes=shapes,
    )


_listed = [
    *_scan_pair("scan", _scan, SCAN),
    *_scan_pair("state_norm", _state_norm, SCAN[:3]),
    *_scan_pair("window", _window, SCAN[:3]),
    Op("step", inputs.step_inputs, _step, _naive_step, costs.step, STEP, ("contiguous",), graph=True),
    *_pair(
        "conv",
        costs.conv,
        costs.conv_backward,
        inputs=inputs.conv_inputs,
        ours=_conv,
        oracle=_naive_conv,
        shapes=LONG_AND_WIDE,
    ),
    *_pair(
        "norm",
        costs.norm,
        costs.norm_backward,
        inputs=inputs.norm_inputs,
        ours=_norm,
        oracle=_naive_norm,
        shapes=LONG_AND_WIDE,
    ),
    *_pair(
        "add_norm",
        costs.add_norm,
        costs.add_norm_backward,
        inputs=inputs.add_norm_inputs,
        ours=_add_norm,
        oracle=_naive_add_norm,
        shapes=LONG_AND_WIDE,
        layouts=("contiguous",),
        starts=_of_sum_and_norm,
    ),
    *_pair(
        "head",
        costs.head,
        costs.head_backward,
        inputs=inputs.head_inputs,
        ours=_head,
        oracle=whole_head,
        shapes=SCAN[1:2],
        layouts=("contiguous",),
        starts=_of_losses,
    ),
    *_pair(
        "layer",
        costs.layer,
        costs.layer_backward,
        inputs=inputs.layer_inputs,
        ours=_layer,
        oracle=_naive_layer,
        shapes=LONG_AND_WIDE,
        layouts=("contiguous",),
    ),
]
OPS = {op.name: op for op in _listed}

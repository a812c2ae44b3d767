"""Peers of our operators: public kernels, called on the same inputs, found if they are installed.

mamba_ssm      the Triton kernels of state-spaces/mamba; its __init__, which asks for CUDA builds, is not run
causal_conv1d  the CUDA kernels of Dao-AILab/causal-conv1d
fla            simple_gla of flash-linear-attention; B and C are copied to every head, dt and x multiplied
               and D x left out before the clock starts, all in its favour
liger_kernel   the linear cross-entropy of linkedin/Liger-Kernel, a loss a token
torch          F.conv1d, F.rms_norm, F.cross_entropy of all logits and what else PyTorch has
unmitigated    our own scan without the mitigation: what that costs
"""

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kernels.benchmarks.inputs import Inputs
from kernels.benchmarks.ops import OPS, Outputs, Run, whole_head

PEERS = ("mamba_ssm", "causal_conv1d", "fla", "liger_kernel", "torch", "unmitigated")


@dataclass(frozen=True)
class Contender:
    """One way to compute an operator.

    prepare: our inputs -> its own, not timed. finish: its outputs -> ours, to compare with the oracle; None
    for another function. variant: one of several to try, e.g. a chunk size.
    """

    system: str
    run: Run
    variant: str = ""
    prepare: Callable[[Inputs], Inputs] = lambda given: given
    finish: Callable[[Outputs, Inputs], Outputs] | None = lambda outputs, given: outputs


def contenders(base: str, systems: Sequence[str]) -> tuple[list[Contender], dict[str, str]]:
    """Peers of an operator (name without `_backward`), and why others of `systems` are absent."""
    found, absent = [], {}
    for system in systems:
        try:
            found += _KNOWN[system](base)
        except ImportError as error:
            absent[system] = str(error).splitlines()[0]
    return found, absent


def _mamba_ssm(base: str) -> list[Contender]:
    if base == "scan":
        combined = _mamba("ssd_combined").mamba_chunk_scan_combined

        def scan(given: Inputs, chunk: int) -> Outputs:
            tokens = [given[name] for name in ("x", "dt", "A", "B", "C")]
            rest = {"D": given["D"], "dt_bias": given["dt_bias"], "dt_softplus": True}
            return combined(*tokens, chunk, **rest, return_final_states=True)

        return _by_chunk(scan)
    if base == "layer":
        _mamba_combined()  # here, or absent
        return _by_chunk(_mamba_layer)
    if base == "step":
        update = _mamba("selective_state_update").selective_state_update
        return [Contender("mamba_ssm", lambda given: _updated(update, given), prepare=_per_channel)]
    if base == "norm":
        rmsnorm = _mamba("layernorm_gated").rmsnorm_fn

        def norm(given: Inputs) -> Outputs:
            options = {"z": given["z"], "eps": 1e-5, "norm_before_gate": False}
            return (rmsnorm(given["x"], given["weight"], None, **options),)

        return [Contender("mamba_ssm", norm)]
    if base == "add_norm":
        layer_norm = _mamba("layer_norm").layer_norm_fn

        def add_norm(given: Inputs) -> Outputs:
            options = {"residual": given["residual"], "eps": 1e-5, "is_rms_norm": True}
            y, total = layer_norm(given["branch"], given["weight"], None, prenorm=True, **options)
            return total, y

        return [Contender("mamba_ssm", add_norm)]
    return []


def _by_chunk(run: Callable[..., Outputs]) -> list[Contender]:
    chunks = (128, 256)
    return [Contender("mamba_ssm", functools.partial(run, chunk=c), f"chunk {c}") for c in chunks]


@functools.cache
def _mamba(module: str) -> Any:
    """A module of mamba_ssm.ops.triton, without running mamba_ssm/__init__.py."""
    if "mamba_ssm" not in sys.modules:
        spec = importlib.util.find_spec("mamba_ssm")
        if spec is None:
            raise ImportError("not installed")
        package = types.ModuleType("mamba_ssm")
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["mamba_ssm"] = package
    return importlib.import_module(f"mamba_ssm.ops.triton.{module}")


def _mamba_layer(given: Inputs, chunk: int) -> Outputs:
    module = given["module"]
    return (fused_mamba_layer(module, F.linear(given["u"], module.in_proj.weight), chunk),)


def _mamba_combined() -> Any:
    module = _mamba("ssd_combined")
    if module.causal_conv1d_fwd_function is None:
        raise ImportError("its layer needs causal_conv1d")
    return module.mamba_split_conv1d_scan_combined


def fused_mamba_layer(m: Any, mixed: Tensor, chunk: int, **options: Any) -> Any:
    """What mamba_ssm makes of in_proj's output with our layer's parameters. Raises ImportError."""
    c = m.config
    return _mamba_combined()(
        mixed,
        m.conv1d.weight[:, 0],
        m.conv1d.bias,
        m.dt_bias,
        -m.A_log.float().exp(),
        m.D,
        chunk,
        rmsnorm_weight=m.norm.weight,
        rmsnorm_eps=c.norm_eps,
        outproj_weight=m.out_proj.weight,
        headdim=c.headdim,
        ngroups=c.n_groups,
        norm_before_gate=False,
        **options,
    )


def _per_channel(given: Inputs) -> Inputs:
    """dt, A, D and dt_bias expanded over channels, which is what selective_state_update takes."""
    channels, d_state = given["state"].shape[2:]
    expanded = {
        name: given[name][..., None].expand(*given[name].shape, channels) for name in ("dt", "D", "dt_bias")
    }
    return given | expanded | {"A": given["A"][:, None, None].expand(-1, channels, d_state)}


def _updated(update: Any, given: Inputs) -> Outputs:
    names = ("state", "x", "dt", "A", "B", "C", "D")
    y = update(*(given[name] for name in names), dt_bias=given["dt_bias"], dt_softplus=True)
    return y, given["state"]


def _causal_conv1d(base: str) -> list[Contender]:
    if base != "conv":
        return []
    convolve = importlib.import_module("causal_conv1d").causal_conv1d_fn

    def conv(given: Inputs) -> Outputs:
        y = convolve(given["x"].transpose(1, 2), given["weight"], given["bias"], activation="silu")
        return (y.transpose(1, 2),)

    return [Contender("causal_conv1d", conv)]


def _fla(base: str) -> list[Contender]:
    if base != "scan":
        return []
    chunk_simple_gla = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla

    def scan(given: Inputs) -> Outputs:
        q, k, v, g = (given[name] for name in "qkvg")
        return chunk_simple_gla(q, k, v, g=g, scale=1.0, output_final_state=True)

    def finish(outputs: Outputs, given: Inputs) -> Outputs:
        return outputs[0] + given["x"] * given["D"][:, None], outputs[1].transpose(-1, -2)

    return [Contender("fla", scan, prepare=_per_head, finish=finish)]


def _per_head(given: Inputs) -> Inputs:
    x, heads = given["x"], given["x"].shape[2]
    dt = F.softplus(given["dt"].float() + given["dt_bias"])
    q, k = (given[name].repeat_interleave(heads // given[name].shape[2], 2) for name in "CB")
    return {"q": q, "k": k, "v": (x * dt[..., None]).to(x.dtype), "g": dt * given["A"]}


def _liger_kernel(base: str) -> list[Contender]:
    if base != "head":
        return []
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    losses = module.LigerFusedLinearCrossEntropyLoss(reduction="none")

    def head(given: Inputs) -> Outputs:
        hidden, targets = given["hidden"], given["targets"]
        return (losses(given["weight"], hidden.flatten(0, 1), targets.flatten()).view_as(targets),)

    return [Contender("liger_kernel", head)]


def _torch(base: str) -> list[Contender]:
    known = {"conv": _torch_conv, "norm": _torch_norm, "add_norm": _torch_add_norm, "head": whole_head}
    return [Contender("torch", known[base])] if base in known else []


def _torch_conv(given: Inputs) -> Outputs:
    x, weight = given["x"].transpose(1, 2), given["weight"]
    y = F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], given["bias"], groups=len(weight))
    return (F.silu(y).transpose(1, 2),)


def _torch_norm(given: Inputs) -> Outputs:
    gated: Tensor = (given["x"] * F.silu(given["z"])).float()
    return (F.rms_norm(gated, given["weight"].shape, given["weight"], 1e-5).to(given["x"].dtype),)


def _torch_add_norm(given: Inputs) -> Outputs:
    total = given["residual"] + given["branch"]
    y = F.rms_norm(total, given["weight"].shape, given["weight"], 1e-5)
    return total, y.to(given["branch"].dtype)


def _unmitigated(base: str) -> list[Contender]:
    if base not in ("state_norm", "window"):
        return []
    return [Contender("unmitigated", OPS["scan"].ours, finish=None)]


_KNOWN = {
    "mamba_ssm": _mamba_ssm,
    "causal_conv1d": _causal_conv1d,
    "fla": _fla,
    "liger_kernel": _liger_kernel,
    "torch": _torch,
    "unmitigated": _unmitigated,
}

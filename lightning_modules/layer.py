"""One layer of Mamba-2 (arXiv 2405.21060): parameter names of the public state-spaces checkpoints."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from conf.schema import ModelConfig
from kernels.arguments import products_dtype
from kernels.conv import causal_conv1d
from kernels.mixer import fused_mixer, takes
from kernels.norm import add_rms_norm, gated_rms_norm, rms_norm
from kernels.ssd import Mitigation, Window, ssd_scan
from lightning_modules.state import LayerState


class Operators(Protocol):
    """What stands in for the functions of these names that hand something from token to token: the ranks of
    a `Context`, the single token of `lightning_modules.generation.step`."""

    def causal_conv1d(self, x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Any: ...

    def ssd_scan(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any) -> Any: ...

    @property
    def mixer(self) -> Callable[..., Any] | None:
        """In place of `fused_mixer`; None: the parts of a layer are called one by one."""

    def positions(self, position: Tensor, starts: Tensor | None, length: int) -> tuple[Tensor, Tensor]: ...


class AddRMSNorm(nn.Module):
    """Adds a block's branch to the residual stream; RMSNorm of the sum in fp32. Under autocast the norm is in
    the dtype of the products that read it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.d_model))

    def forward(self, residual: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """(..., d_model) each -> the stream with the branch, and its norm. branch: None before any block."""
        dtype = products_dtype(residual)
        if branch is None:
            return residual, rms_norm(residual, self.weight, eps=self.eps, dtype=dtype)
        return add_rms_norm(residual, branch, self.weight, eps=self.eps, dtype=dtype)


class GatedRMSNorm(nn.Module):
    """RMSNorm over each group's channels, before or after the gate silu(z)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps, self.n_groups = config.norm_eps, config.n_groups
        self.norm_before_gate = config.norm_before_gate
        self.weight = nn.Parameter(torch.ones(config.d_inner))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm(
            y,
            z,
            self.weight,
            eps=self.eps,
            n_groups=self.n_groups,
            norm_before_gate=self.norm_before_gate,
        )


class Mamba2(nn.Module):
    """in_proj -> causal convolution -> SSD scan -> gated RMSNorm -> out_proj. On a GPU all but in_proj is one
    operator, unless something stands in for one of its parts or a mitigation is composed of several scans."""

    # What stands in for `ssd_scan` while a probe reads along: the same function, seen from outside.
    scan: Callable[..., tuple[Tensor, Any]] | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.in_proj = nn.Linear(config.d_model, config.d_in_proj, bias=False)
        # nn.Conv1d names and initialises the parameters as public checkpoints do; causal_conv1d computes.
        self.conv1d = nn.Conv1d(config.conv_dim, config.conv_dim, config.d_conv, groups=config.conv_dim)
        self.dt_bias = nn.Parameter(_initial_dt_bias(config))
        self.A_log = nn.Parameter(torch.empty(config.n_heads).uniform_(*config.A_init_range).log())
        self.D = nn.Parameter(torch.ones(config.d_inner if config.d_has_hdim else config.n_heads))
        self.norm = GatedRMSNorm(config)
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)
        # Mamba-2 keeps the variance of the residual stream independent of depth.
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(config.n_layers)

    def forward(
        self,
        u: Tensor,
        state: LayerState,
        document_starts: Tensor | None,
        position: Tensor,
        mitigation: Mitigation,
        context: Operators | None = None,
    ) -> tuple[Tensor, LayerState]:
        """u (B, T, d_model) -> (B, T, d_model) and the state after the last token.

        position: (B,), tokens since the row's document began, before these.
        context: the ranks that hold the other pieces of the rows, if u is a piece.
        """
        c, zxbcdt, A = self.config, self.in_proj(u), -self.A_log.float().exp()
        D = self.D.float().view(c.n_heads, -1) if c.d_has_hdim else self.D.float()
        mixer = None
        if self._fuses(zxbcdt, mitigation):
            mixer = fused_mixer if context is None else context.mixer
        if mixer is not None:
            assert self.conv1d.bias is not None
            assert not isinstance(state.ssm, Window)
            out, conv_state, ssm_state = mixer(
                zxbcdt,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                self.dt_bias,
                A,
                D,
                self.norm.weight,
                self.out_proj.weight.to(zxbcdt.dtype),
                headdim=c.headdim,
                n_groups=c.n_groups,
                eps=c.norm_eps,
                norm_before_gate=c.norm_before_gate,
                dt_limit=c.dt_limit,
                mitigation=mitigation,
                conv_state=state.conv,
                initial_state=state.ssm,
                document_starts=document_starts,
            )
            return out, LayerState(conv=conv_state, ssm=ssm_state)
        convolve: Callable[..., tuple[Tensor, Tensor]] = causal_conv1d
        scan = self.scan or ssd_scan
        if context is not None:
            convolve, scan = context.causal_conv1d, context.ssd_scan
        z, xBC, dt = zxbcdt.split([c.d_inner, c.conv_dim, c.n_heads], dim=-1)
        xBC, conv_state = convolve(
            xBC,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            initial_state=state.conv,
            document_starts=document_starts,
        )
        x, B, C = xBC.split([c.d_inner, c.n_groups * c.d_state, c.n_groups * c.d_state], dim=-1)
        y, ssm_state = scan(
            x.unflatten(-1, (c.n_heads, c.headdim)),
            dt,
            A,
            B.unflatten(-1, (c.n_groups, c.d_state)),
            C.unflatten(-1, (c.n_groups, c.d_state)),
            D=D,
            initial_state=state.ssm,
            document_starts=document_starts,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=c.dt_limit,
            mitigation=mitigation,
            position=position,
            chunk_size=c.chunk_size,
        )
        out = self.out_proj(self.norm(y.flatten(2), z))
        return out, LayerState(conv=conv_state, ssm=ssm_state)

    def _fuses(self, zxbcdt: Tensor, mitigation: Mitigation) -> bool:
        """Whether all that follows is one operator."""
        return zxbcdt.is_cuda and self.scan is None and takes(mitigation)


@contextmanager
def scanning_with(mixers: Sequence[Any], scans: Iterable[Callable[..., Any]]) -> Iterator[None]:
    """Within the block, `scans` stand in for the scans of `mixers` (Mamba2, or a guest's), one each."""
    try:
        for mixer, scan in zip(mixers, scans, strict=True):
            mixer.scan = scan
        yield
    finally:
        for mixer in mixers:
            mixer.scan = None


def _initial_dt_bias(config: ModelConfig) -> Tensor:
    """softplus^{-1} of a dt drawn log-uniformly from [dt_min, dt_max]."""
    low, high = math.log(config.dt_min), math.log(config.dt_max)
    dt = torch.empty(config.n_heads).uniform_(low, high).exp().clamp(min=config.dt_init_floor)
    return dt + torch.log(-torch.expm1(-dt))


class Block(nn.Module):
    """Mamba2(RMSNorm(x)), x the residual stream in fp32: the norm of the next block adds it to x."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = AddRMSNorm(config)
        self.mixer = Mamba2(config)

    def forward(
        self,
        residual: Tensor,
        branch: Tensor | None,
        state: LayerState,
        document_starts: Tensor | None,
        position: Tensor,
        mitigation: Mitigation,
        context: Operators | None = None,
    ) -> tuple[Tensor, Tensor, LayerState]:
        """The stream and the last block's branch -> the stream with it, this block's branch and its state."""
        residual, u = self.norm(residual, branch)
        branch, state = self.mixer(u, state, document_starts, position, mitigation, context)
        return residual, branch, state

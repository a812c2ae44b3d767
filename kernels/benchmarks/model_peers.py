"""What the benchmark compares with: the same model written plainly in PyTorch, and transformers' Mamba-2."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.schema import ModelConfig
from kernels.ssd.discretize import discretize
from kernels.ssd.mitigation import NONE


def einsum_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor, chunk_size: int, **options: Any
) -> tuple[Tensor, Tensor]:
    """The chunked SSD algorithm of arXiv 2405.21060 (listing 1) as einsums, gradients by autograd.

    Written as one would without thinking of memory traffic; T must be a multiple of chunk_size, G must be 1.
    """
    log_decay, insert = discretize(
        dt, A, options["dt_bias"], options["dt_softplus"], options["dt_limit"], NONE
    )
    chunked = [t.unflatten(1, (-1, chunk_size)) for t in (x * insert[..., None].to(x.dtype), log_decay, B, C)]
    X, a, Bc, Cc = chunked[0], chunked[1].movedim(3, 1), chunked[2].squeeze(3), chunked[3].squeeze(3)
    sums = a.cumsum(-1)  # b h c q
    L = _segment_sums(a).exp()
    near = torch.einsum("bcqn,bcrn,bhcqr,bcrhp->bcqhp", Cc, Bc, L.to(x.dtype), X)
    to_end = (sums[..., -1:] - sums).exp().to(x.dtype)
    states = torch.einsum("bcrn,bhcr,bcrhp->bchpn", Bc, to_end, X)
    states = torch.cat([options["initial_state"][:, None].to(x.dtype), states], dim=1)
    between = _segment_sums(F.pad(sums[..., -1], (1, 0))).exp().to(x.dtype)
    states = torch.einsum("bhzc,bchpn->bzhpn", between, states)
    far = torch.einsum("bcqn,bchpn,bhcq->bcqhp", Cc, states[:, :-1], sums.exp().to(x.dtype))
    y = (near + far).flatten(1, 2) + x * D[:, None].to(x.dtype)
    return y, states[:, -1].float()


def _segment_sums(a: Tensor) -> Tensor:
    """sum of a over (r, q] for every pair, -inf above the diagonal."""
    size = a.shape[-1]
    sums = a.cumsum(-1)
    visible = torch.ones(size, size, dtype=torch.bool, device=a.device).tril()
    return (sums[..., :, None] - sums[..., None, :]).masked_fill(~visible, -torch.inf)


def plain_conv(
    x: Tensor, weight: Tensor, bias: Tensor, *, initial_state: Tensor, document_starts: None
) -> tuple[Tensor, Tensor]:
    """The causal convolution through F.conv1d."""
    padded = torch.cat([initial_state.to(x.dtype), x.transpose(1, 2)], dim=2)
    y = F.conv1d(padded, weight[:, None].to(x.dtype), bias.to(x.dtype), groups=weight.shape[0])
    return F.silu(y).transpose(1, 2), padded[:, :, 1 - weight.shape[1] :]


def plain_norm(
    x: Tensor, z: Tensor, weight: Tensor, *, eps: float, n_groups: int, norm_before_gate: bool
) -> Tensor:
    """The gated norm through F.rms_norm; gate first, one group."""
    return F.rms_norm((x * F.silu(z)).float(), weight.shape, weight, eps).to(x.dtype)


PLAIN = {"ssd_scan": einsum_scan, "causal_conv1d": plain_conv, "gated_rms_norm": plain_norm}


@contextlib.contextmanager
def replaced(*names: str) -> Iterator[None]:
    """Our own backbone with plain PyTorch in place of the named kernels."""
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch(f"lightning_modules.layer.{name}", PLAIN[name]))
        yield


def transformers_model(config: ModelConfig) -> nn.Module:
    """transformers' Mamba2ForCausalLM of the same shape, on its PyTorch path (its kernels need CUDA)."""
    from transformers import Mamba2Config, Mamba2ForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    return Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layers,
            state_size=config.d_state,
            head_dim=config.headdim,
            num_heads=config.n_heads,
            n_groups=config.n_groups,
            expand=config.expand,
            conv_kernel=config.d_conv,
            chunk_size=config.chunk_size,
            use_cache=False,
        )
    )

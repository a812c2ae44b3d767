"""Cross-entropy of a linear head on Triton kernels as one operator, `longstate::linear_cross_entropy`.

The matrix products are PyTorch's. Between them a slice of logits, in their own dtype, is read once for the
losses; in the backward pass it is formed again and turned into its gradient where it lies.
"""

# mypy: allow-incomplete-defs
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.arguments import products_dtype
from kernels.cross_entropy.recall import Head
from kernels.triton_support import on_device
from kernels.tuning import Config, bucket, pick

SLICE_BYTES = 2**28  # of logits; each slice adds its share to dweight (V, d), so few large ones
LOSS_CONFIGS = (
    Config(num_warps=8, meta={"BLOCK": 8192}),
    Config(num_warps=8, meta={"BLOCK": 4096}),
    Config(num_warps=4, meta={"BLOCK": 4096}),
)
GRADIENT_CONFIGS = (
    Config(num_warps=4, meta={"BLOCK": 4096}),
    Config(num_warps=4, meta={"BLOCK": 2048}),
    Config(num_warps=8, meta={"BLOCK": 8192}),
)


@triton.jit
def loss_kernel(logits, labels, losses, normalisers, stride, V, BLOCK: tl.constexpr):
    """A token a program: the log of its sum of exponentials, shifted by the maximum so far, and its loss.

    Rows are `stride` apart, with -inf from V on.
    """
    token = tl.program_id(0).to(tl.int64)
    row, block = logits + token * stride, tl.arange(0, BLOCK)
    label = tl.load(labels + token)
    target = tl.load(row + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)
    most, total = float("-inf"), 0.0
    for start in range(0, stride, BLOCK):
        v = tl.load(row + start + block, mask=start + block < stride, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(v, 0))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(v - higher), 0)
        most = higher
    normaliser = most + tl.log(total)
    tl.store(normalisers + token, normaliser)
    tl.store(losses + token, normaliser - target)


@triton.jit
def gradient_kernel(logits, labels, normalisers, dlosses, stride, BLOCK: tl.constexpr):
    """A block of one token's logits a program, replaced by d (softmax - onehot), d the loss's gradient."""
    blocks = tl.cdiv(stride, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    v = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    place = logits + token * stride + v
    p = tl.exp(tl.load(place, mask=v < stride, other=0.0).to(tl.float32) - tl.load(normalisers + token))
    d = tl.load(dlosses + token) * tl.where(v == tl.load(labels + token), p - 1.0, p)
    tl.store(place, d.to(logits.dtype.element_ty), mask=v < stride)


def triton_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As `kernels.cross_entropy.linear_cross_entropy` of hidden (M, d) and labels (M,)."""
    dtype = products_dtype(hidden)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"hidden is {dtype}: the Triton head takes float32, bfloat16 and float16")
    return _forward(hidden.to(dtype), weight.to(dtype), labels)[0]


@torch.library.custom_op("longstate::linear_cross_entropy", mutates_args=())
def _forward(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """losses and the logarithms of the sums of exponentials, (M,) fp32."""
    losses, normalisers = (hidden.new_empty(len(labels), dtype=torch.float32) for _ in range(2))
    settings = _settings("head_loss", LOSS_CONFIGS, weight)
    labels = labels.contiguous()
    for tokens, padded in _slices(hidden, weight):
        padded[:, len(weight) :] = -torch.inf
        with on_device(hidden):
            loss_kernel[(len(padded),)](
                padded,
                labels[tokens],
                losses[tokens],
                normalisers[tokens],
                padded.stride(0),
                len(weight),
                **settings,
            )
    return losses, normalisers


@_forward.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    losses, normalisers = (hidden.new_empty(labels.shape[0], dtype=torch.float32) for _ in range(2))
    return losses, normalisers


@torch.library.custom_op("longstate::linear_cross_entropy_backward", mutates_args=())
def _backward(
    dlosses: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, normalisers: Tensor
) -> tuple[Tensor, Tensor]:
    """dhidden, and dweight, whose slices are added in fp32."""
    dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
    settings = _settings("head_gradient", GRADIENT_CONFIGS, weight)
    labels, dlosses = labels.contiguous(), dlosses.contiguous()
    for tokens, padded in _slices(hidden, weight):
        with on_device(hidden):
            gradient_kernel[(len(padded) * triton.cdiv(padded.stride(0), settings["BLOCK"]),)](
                padded, labels[tokens], normalisers[tokens], dlosses[tokens], padded.stride(0), **settings
            )
        dlogits = padded[:, : len(weight)]
        torch.mm(dlogits, weight, out=dhidden[tokens])
        dweight += dlogits.t() @ hidden[tokens]
    return dhidden, dweight.to(weight.dtype)


@_backward.register_fake
def _(
    dlosses: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, normalisers: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _gradients(ctx: Any, dlosses: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_backward(dlosses, *ctx.saved_tensors), None


_forward.register_autograd(_gradients, setup_context=_setup_context)
HEAD = Head(_forward, _backward)


def _slices(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Tokens and their logits (m, V), in rows that 16 divides; one buffer serves every slice."""
    stride = triton.cdiv(len(weight), 16) * 16
    step = max(1, min(len(hidden), SLICE_BYTES // (stride * hidden.element_size())))
    buffer = hidden.new_empty(step, stride)
    for start in range(0, len(hidden), step):
        tokens = slice(start, min(start + step, len(hidden)))
        padded = buffer[: tokens.stop - start]
        torch.mm(hidden[tokens], weight.t(), out=padded[:, : len(weight)])
        yield tokens, padded


def _settings(kernel: str, configs: tuple[Config, ...], weight: Tensor) -> dict[str, Any]:
    settings = pick(kernel, configs, V=bucket(len(weight)), dtype=str(weight.dtype)[6:]).settings()
    return settings | {"BLOCK": min(settings["BLOCK"], max(16, bucket(len(weight))))}

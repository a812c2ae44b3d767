"""Sums over the tokens of a piece, by what it keeps of each: summaries of pieces, and their gradients."""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_TOKENS = 16384  # of all rows: bounds the copies that `weighted_sum` makes


class Reach(NamedTuple):
    """What a piece keeps, from its log decays and the documents that start in it. All fp32."""

    inward: Tensor  # (B, T, H), of the state that enters, after each token
    outward: Tensor  # (B, T, H), of each token, in the state that leaves
    kept: Tensor  # (B, H), of the state that enters, in the state that leaves


def reach_of(log_decay: Tensor, starts: Tensor | None) -> Reach:
    # float64, one number a token and head: differences of long sums must keep a retention near 1
    sums = log_decay.double().cumsum(1)
    inward, outward = sums.exp().float(), (sums[:, -1:] - sums).exp().float()
    if starts is not None:
        documents = starts.cumsum(1)[..., None]
        inward = inward * (documents == 0)
        outward = outward * (documents == documents[:, -1:])
    return Reach(inward, outward, inward[:, -1])


def weighted_sum(weight: Tensor, u: Tensor, V: Tensor) -> Tensor:
    """sum_t weight_t u_t V_t^T, (B, H, P, N) fp32, of weight (B, T, H), u (B, T, H, P) and V (B, T, G, N)."""
    batch, length, heads, headdim = u.shape
    groups, d_state = V.shape[2:]
    total = u.new_zeros(batch, groups, heads // groups * headdim, d_state, dtype=torch.float32)
    step = max(1, BLOCK_TOKENS // batch)
    with torch.autocast(u.device.type, enabled=False):
        for start in range(0, length, step):
            span = slice(start, start + step)
            left = (u[:, span] * weight[:, span, :, None]).unflatten(2, (groups, -1)).flatten(3)  # b t g kp
            total += _product(left.permute(0, 2, 3, 1), V[:, span].transpose(1, 2))
    return total.view(batch, heads, headdim, d_state)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left (B, G, M, T) fp32 times right (B, G, T, N), in fp32.

    On a GPU tensor cores read 16-bit operands and sum in fp32: left is rounded, as operands of the scan are.
    """
    if not right.is_cuda or right.dtype not in (torch.bfloat16, torch.float16):
        return left @ right.float()
    sums = torch.bmm(left.to(right.dtype).flatten(0, 1), right.flatten(0, 1), out_dtype=torch.float32)
    return sums.unflatten(0, right.shape[:2])

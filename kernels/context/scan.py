"""The SSD scan of a piece: one collective forward and one backward, whatever the length. See README.md."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.context.group import Context
from kernels.ssd import Mitigation, ssd_scan
from kernels.ssd.discretize import discretize
from kernels.ssd.heads import spread
from kernels.ssd.mitigation import NONE
from kernels.ssd.operators import hard_resets

BLOCK_TOKENS = 16384  # of all rows: bounds the copies that `_weighted_sum` makes


def refusal(name: str, heads: object) -> str | None:
    """Why a sequence cannot be sharded under a mitigation; None if it can."""
    if name == "state_norm":
        return "clipping is not linear in the state, so pieces cannot be scanned before what enters them"
    if name == "sliding_window":
        return "what enters a piece is a window of tokens, not a state: its size grows with the window"
    if name == "hard_reset" and heads is not None:
        return "resets of some heads only would need document starts of their own"
    return None


def context_scan(
    context: Context,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
    mitigation: Mitigation | None = None,
    position: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`kernels.ssd.ssd_scan` of this rank's piece, differentiable throughout.

    Args:
        initial_state: (B, H, P, N) fp32, before the sequence; only the first rank reads it.
        document_starts: (B, T) bool of this piece; a rank may have them and another none.
        position: (B,), tokens of the row's document before this piece (`Context.positions`).

    Returns:
        y (B, T, H, P) of this piece, and the state after the sequence (B, H, P, N) fp32, the same on every
        rank. A gradient of that state is taken from the first rank, where the tokens that come next are.

    Raises:
        ValueError: for a mitigation under which pieces cannot be merged, and as `ssd_scan`.
    """
    rule = spread(mitigation or NONE, x.shape[2], x.device)
    if (reason := refusal(rule.name, rule.heads)) is not None:
        raise ValueError(f"mitigation {rule.name}: not under context parallelism: {reason}")
    if rule.name == "hard_reset":
        assert rule.every is not None
        document_starts, rule = hard_resets(document_starts, position, x, rule.every), NONE
    first = context.rank == 0
    with torch.no_grad():
        log_decay, insert = discretize(dt, A.float(), dt_bias, dt_softplus, dt_limit, rule)
        reach = _reach(log_decay, document_starts)
        added = _weighted_sum(reach.outward * insert, x, B)
        if first and initial_state is not None:
            added += reach.kept[..., None, None] * initial_state
        kept, added = _all_gather(context, reach.kept, added)
        entering = final = added[0]
        for rank in range(1, context.size):
            entering = final if rank == context.rank else entering
            final = torch.addcmul(added[rank], kept[rank][..., None, None], final)
    y, leaving = ssd_scan(
        x, dt, A, B, C,
        initial_state=initial_state if first else entering,
        document_starts=document_starts,
        dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit, mitigation=rule, **options,
    )  # fmt: skip
    return _Chain.apply(y, leaving, final, C, reach.inward, kept, context)


class _Reach(NamedTuple):
    """What a piece keeps, from its log decays and the documents that start in it. All fp32."""

    inward: Tensor  # (B, T, H), of the state that enters, after each token
    outward: Tensor  # (B, T, H), of each token, in the state that leaves
    kept: Tensor  # (B, H), of the state that enters, in the state that leaves


def _reach(log_decay: Tensor, starts: Tensor | None) -> _Reach:
    # float64, one number a token and head: differences of long sums must keep a retention near 1
    sums = log_decay.double().cumsum(1)
    inward, outward = sums.exp().float(), (sums[:, -1:] - sums).exp().float()
    if starts is not None:
        documents = starts.cumsum(1)[..., None]
        inward = inward * (documents == 0)
        outward = outward * (documents == documents[:, -1:])
    return _Reach(inward, outward, inward[:, -1])


def _weighted_sum(weight: Tensor, u: Tensor, V: Tensor) -> Tensor:
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


def _all_gather(context: Context, kept: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """kept (B, H) and added (B, H, P, N) of every rank, in one collective."""
    own = torch.cat([kept[..., None], added.flatten(2)], 2)
    everyone = context.all_gather(own)
    return everyone[..., 0], everyone[..., 1:].unflatten(3, added.shape[2:])


class _Chain(torch.autograd.Function):
    """Hands on y and the state after the sequence, as computed; backwards, the gradient of the state that
    leaves each piece: what all later pieces and the sequence's end say of it, merged in reverse.

    The scan of the piece is differentiated by itself, with that gradient. What a piece says of the state that
    enters it is a sum over dy, C and the decays alone, as what it adds is one over x, B and the decays.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        leaving: Tensor,
        final: Tensor,
        C: Tensor,
        inward: Tensor,
        kept: Tensor,
        context: Context,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(C, inward, kept)
        ctx.context = context
        return y.view_as(y), final.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        C, inward, kept = ctx.saved_tensors
        context: Context = ctx.context
        # Nobody needs what the first piece says of its own beginning: its place holds the end's gradient.
        own = dfinal.float() if context.rank == 0 else _weighted_sum(inward, dy, C)
        everyone = context.all_gather(own)
        gradient = everyone[0]
        for rank in range(context.size - 1, context.rank, -1):
            gradient = torch.addcmul(everyone[rank], kept[rank][..., None, None], gradient)
        return dy, gradient, None, None, None, None, None

"""The SSD scan of a piece: one collective forward and one backward, whatever the length. See README.md."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.context.group import Ranks
from kernels.context.sums import reach_of, weighted_sum
from kernels.ssd import Mitigation, ssd_scan
from kernels.ssd.discretize import discretize
from kernels.ssd.heads import spread
from kernels.ssd.mitigation import NONE
from kernels.ssd.operators import hard_resets


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
    context: Ranks,
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
    first, late = context.rank == 0, context.scans_before_merging(x.shape[1])
    with torch.set_grad_enabled(late and torch.is_grad_enabled()):
        log_decay, insert = discretize(dt, A.float(), dt_bias, dt_softplus, dt_limit, rule)
    with torch.no_grad():
        reach = reach_of(log_decay, document_starts)
        added = weighted_sum(reach.outward * insert, x, B)
        merged = states_between(context, reach.kept, added, initial_state)
        if not late:
            entering, final, kept = merged()
    y, leaving = ssd_scan(
        x, dt, A, B, C,
        initial_state=initial_state if first else None if late else entering,
        document_starts=document_starts,
        dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit, mitigation=rule, **options,
    )  # fmt: skip
    if late:
        entering, final, kept = merged()
    correction = (entering, log_decay) if late and not first else (None, None)
    return _Chain.apply(y, leaving, final, C, reach.inward, kept, context, *correction)


def states_between(
    context: Ranks, kept: Tensor, added: Tensor, initial: Tensor | None
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """Tell the others what this piece keeps of a state (B, H) and adds to it (B, H, P, N), changed in place.

    The function returned waits for theirs: what enters this piece, what leaves the last one (B, H, P, N), and
    what each keeps (K, B, H).
    """
    if context.rank == 0 and initial is not None:
        added += kept[..., None, None] * initial
    everyone = context.start_all_gather(torch.cat([kept[..., None], added.flatten(2)], 2))

    def merged() -> tuple[Tensor, Tensor, Tensor]:
        pieces = everyone()
        # copies: a view that is kept for the backward pass would keep every rank's state
        keeps, adds = pieces[..., 0].clone(), pieces[..., 1:].unflatten(3, added.shape[2:])
        entering = final = adds[0].contiguous()
        for rank in range(1, context.size):
            entering = final if rank == context.rank else entering
            final = torch.addcmul(adds[rank], keeps[rank][..., None, None], final)
        return entering, final, keeps

    return merged


def gradient_behind(context: Ranks, said: Tensor, kept: Tensor) -> Callable[[], Tensor]:
    """Tell the others what this piece says of the state that enters it (B, H, P, N). Nobody needs what the
    first piece says: from its rank it is the gradient of the state after the sequence.

    The function returned waits for theirs: the gradient of the state that leaves this piece. kept: as
    `states_between` gives it.
    """
    everyone = context.start_all_gather(said)

    def merged() -> Tensor:
        pieces = everyone()
        gradient = pieces[0]
        for rank in range(context.size - 1, context.rank, -1):
            gradient = torch.addcmul(pieces[rank], kept[rank][..., None, None], gradient)
        return gradient

    return merged


class _Chain(torch.autograd.Function):
    """Hands on y and the state after the sequence, as computed; backwards, the gradient of the state that
    leaves each piece: what all later pieces and the sequence's end say of it, merged in reverse.

    The scan of the piece is differentiated by itself, with that gradient. What a piece says of the state that
    enters it is a sum over dy, C and the decays alone, as what it adds is one over x, B and the decays.

    With `entering` the scan began at zero: y gets what it reads of that state, C and decays its gradients.
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
        context: Ranks,
        entering: Tensor | None,
        log_decay: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(C, inward, kept, entering)
        ctx.context = context
        if entering is None:
            return y.view_as(y), final.clone()
        return (y + inward[..., None] * _read(C, entering)).to(y.dtype), final.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        C, inward, kept, entering = ctx.saved_tensors
        context: Ranks = ctx.context
        said = dfinal.float() if context.rank == 0 else weighted_sum(inward, dy, C)
        merged = gradient_behind(context, said, kept)
        dC = dsums = dlog_decay = None
        if entering is not None:  # while the others' sums are on their way
            dC = _read_backward(dy * inward[..., None], entering, C)
            dsums = (inward * (dy * _read(C, entering)).sum(3)).double()
        gradient = merged()
        if entering is not None and dsums is not None:
            dsums[:, -1] += kept[context.rank] * (gradient * entering).sum((2, 3))
            dlog_decay = dsums.flip(1).cumsum(1).flip(1).float()
        return dy, gradient, None, dC, None, None, None, None, dlog_decay


def _read(C: Tensor, state: Tensor) -> Tensor:
    """What every token reads of one state: C (B, T, G, N), state (B, H, P, N) -> (B, T, H, P) fp32."""
    groups = C.shape[2]
    with torch.autocast(C.device.type, enabled=False):
        states = state.unflatten(1, (groups, -1)).flatten(2, 3).to(C.dtype)  # b g kp n
        read = C.transpose(1, 2) @ states.transpose(2, 3)
    return read.transpose(1, 2).reshape(*C.shape[:2], *state.shape[1:3]).float()


def _read_backward(dread: Tensor, state: Tensor, C: Tensor) -> Tensor:
    """The gradient of C in `_read`."""
    groups = C.shape[2]
    with torch.autocast(C.device.type, enabled=False):
        states = state.unflatten(1, (groups, -1)).flatten(2, 3).to(C.dtype)
        dread = dread.unflatten(2, (groups, -1)).flatten(3).transpose(1, 2).to(C.dtype)  # b g t kp
        return (dread @ states).transpose(1, 2)

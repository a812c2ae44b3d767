"""sliding_window: y_t of exactly the tokens (t - r, t] of its document, without subtracting states.

Time is cut into blocks of r tokens. A window is the first part of one block and the last part of the block
before, and each is a scan that is reset at every block's start:

    y_t = C_t . (sum over i <= t of t's block)                                        forwards
        + e^{E_t} C_t . (sum over i > t - r of the block before of e^{D_i} w_i x_i B_i^T)    backwards

E_t is the log decay from the block's start through t, D_i that from i to the end of its block: both are <= 0,
so nothing overflows, and all terms belong to the window, so nothing cancels. Sums of log decays are float64.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ssd.core import Core, Tokens, span_of
from kernels.ssd.heads import groups_of
from kernels.ssd.mitigation import Mitigation
from kernels.ssd.states import states_after


class Window(NamedTuple):
    """The state under sliding_window: the last r - 1 tokens; those of no or another document are all zero.

    Of its heads only, h of them, with the B that they read (g groups, `kernels.ssd.heads.groups_of`); the
    other heads have a state of their own.
    """

    x: Tensor  # (B, r - 1, h, P), the dtype of x
    log_decay: Tensor  # (B, r - 1, h) fp32
    insert: Tensor  # (B, r - 1, h) fp32
    B: Tensor  # (B, r - 1, g, N), the dtype of x
    rest: Tensor  # (B, H - h, P, N) fp32


State = Tensor | Window


def map_state(function: Callable[..., Tensor], *states: Any) -> Any:
    """Apply a function of tensors to states of one kind."""
    if isinstance(states[0], Window):
        return Window(*map(function, *states))
    return function(*states)


def zero_state(
    mitigation: Mitigation,
    batch: int,
    heads: int,
    headdim: int,
    groups: int,
    d_state: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> State:
    """The state before the first token. dtype: of x, which a window keeps."""

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(batch, *shape, dtype=dtype, device=device)

    if mitigation.window is None:
        return zeros(heads, headdim, d_state)
    past, chosen = mitigation.window - 1, mitigation.heads or tuple(range(heads))
    own = len(groups_of(chosen, heads, groups))
    x, B = zeros(past, len(chosen), headdim, dtype=dtype), zeros(past, own, d_state, dtype=dtype)
    decays = zeros(past, len(chosen)), zeros(past, len(chosen))
    return Window(x, *decays, B, zeros(heads - len(chosen), headdim, d_state))


def sliding_window(
    core: Core,
    tokens: Tokens,
    D: Tensor | None,
    past: Window | None,
    document_starts: Tensor | None,
    window: int,
    states_every: int | None,
    windowed: Callable[..., Tensor | None] | None = None,
) -> tuple[Tensor, Window, Tensor | None]:
    """y, the next window and, with `states_every`, the windows' states: two scans, and r tokens for a piece
    however short. windowed: as in `operators.composed_scan`."""
    if windowed is not None and states_every is None and (past is not None or tokens.length > window):
        whole, starts = (tokens, document_starts)
        if past is not None:
            whole, starts = with_past(tokens, past, document_starts, window)
        y = windowed(whole, D, starts, window)
        if y is not None:
            return y[:, whole.length - tokens.length :], last_window(whole, starts, window), None
    # without a past nothing lies before the first block, whose tokens then take no part in the second scan
    skipped = window if past is None and states_every is None and tokens.length > window else 0
    if skipped:
        whole, starts = tokens.span(1, tokens.length), span_of(document_starts, 1, tokens.length)
    else:
        whole, starts = with_past(tokens, past, document_starts, window)
    resets = _block_starts(tokens.x, tokens.length, window)
    resets = resets if document_starts is None else resets | document_starts
    y, _ = core(*tokens, D, None, resets)
    states = None if states_every is None else states_after(tokens, None, resets, states_every)
    if window > 1:
        earlier, reach = _blocks_before(whole, tokens.C[:, skipped:], starts, window)
        resets = _block_starts(tokens.x, earlier.length, window)
        far = core(*earlier, None, None, resets)[0].flip(1)[:, : tokens.length - skipped]
        # a product in fp32, as is then the gradient of reach: addcmul would sum that one in bf16
        y.narrow(1, skipped, far.shape[1]).add_((far * reach[..., None]).to(y.dtype))
        if states is not None and states_every is not None:
            far_states = _states_before(earlier, resets, states_every)[:, : states.shape[1]]
            states = states + reach[:, states_every - 1 :: states_every, :, None, None] * far_states
    return y, last_window(whole, starts, window), states


def with_past(
    tokens: Tokens, past: Window | None, document_starts: Tensor | None, window: int
) -> tuple[Tokens, Tensor | None]:
    """The tokens after the r - 1 of the window before them, whose C is zero; document_starts likewise."""
    before = (0, 0, window - 1, 0)
    if past is None:
        joined = [F.pad(t, (0, 0) * (t.dim() - 3) + before) for t in tokens]
    else:
        joined = [torch.cat([old, new], 1) for old, new in zip(past[:4], tokens, strict=False)]
        joined.append(F.pad(tokens.C, (0, 0, *before)))
    return Tokens(*joined), None if document_starts is None else F.pad(document_starts, before[2:])


def last_window(whole: Tokens, starts: Tensor | None, window: int) -> Window:
    """The window after tokens that already have their past before them."""
    last = whole.span(whole.length - window + 1, whole.length)[:4]
    rest = whole.x.new_empty(len(whole.x), 0, whole.x.shape[3], whole.B.shape[3], dtype=torch.float32)
    if starts is None:
        return Window(*[*(t.clone() for t in last), rest])
    documents = starts.cumsum(1)
    here = documents[:, whole.length - window + 1 :] == documents[:, -1:]
    kept = [t.masked_fill(~here.view(*here.shape, *(1,) * (t.dim() - 2)), 0.0) for t in last]
    return Window(*[*kept, rest])


def _block_starts(like: Tensor, length: int, window: int) -> Tensor:
    """(B, length) bool: the first tokens of blocks."""
    return (torch.arange(length, device=like.device) % window == 0).repeat(len(like), 1)


def _blocks_before(whole: Tokens, C: Tensor, starts: Tensor | None, window: int) -> tuple[Tokens, Tensor]:
    """The scan backwards over the blocks before, and what each token keeps of its result, e^{E_t}: (B, T, H).

    Token m of the scan is m - (r - 1) of the piece and is read by token m: the earliest that token m sees.
    The last token of every block here is the first of its block there: seen by none, it inserts nothing.
    """
    length = C.shape[1]
    count = -(-length // window)
    pad = count * window - length  # tokens without decay that complete the last block

    def blocks(t: Tensor, first: int) -> Tensor:
        return t[:, first : first + count * window].unflatten(1, (count, window))

    sums = F.pad(whole.log_decay, (0, 0, 0, pad)).double().cumsum(1)
    here, there = blocks(sums, window - 1), blocks(sums, 0)[:, :, :-1]
    border = there[:, :, -1:]
    reach, weight = (here - border).exp(), (border - there).exp()
    if starts is not None:
        documents = F.pad(starts, (0, pad)).cumsum(1)[..., None]
        document = blocks(documents, 0)[:, :, -2:-1]  # at the border
        reach = reach * (blocks(documents, window - 1) == document)
        weight = weight * (blocks(documents, 0)[:, :, :-1] == document)
    weight = weight * blocks(whole.insert, 0)[:, :, :-1]
    weight = F.pad(weight, (0, 0, 0, 1)).flatten(1, 2).to(whole.insert.dtype)
    C = F.pad(C, (0, 0, 0, 0, 0, pad))
    order = (whole.x, torch.zeros_like(weight), weight, whole.B, C)
    backwards = Tokens(*(t[:, : count * window].flip(1) for t in order))
    return backwards, reach.flatten(1, 2)[:, :length].to(weight.dtype)


def _states_before(earlier: Tokens, resets: Tensor, every: int) -> Tensor:
    """States of the backwards scan where tokens k - 1, 2k - 1, ... of the piece read them."""
    pad = -(earlier.length + 1) % every  # so that these tokens end spans of k, backwards in time
    padded = Tokens(*(F.pad(t, (0, 0) * (t.dim() - 2) + (pad, 0)) for t in earlier))
    return states_after(padded, None, F.pad(resets, (pad, 0)), every).flip(1)

"""The fused layer of the other folders' launches, forward and backward; no operator of its own."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from kernels.conv import triton_conv
from kernels.norm import triton_norm
from kernels.ssd.triton_call import Decay
from kernels.ssd.triton_scan import launches, like, numbers_of
from kernels.triton_support import on_device

Kept = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
# Where other ranks hold the tokens before and behind these: what these keep and add -> the state that enters
# them; what these say of that state -> a wait for what is said of the one that leaves them.
Enter = Callable[[Tensor, Tensor], Tensor | None]
Leave = Callable[[Tensor], Callable[[], Tensor]]


class Weights(NamedTuple):
    """conv_weight (C, W), conv_bias (C,); rate, log_alpha, weight: see `discretize.per_head_factors`; dt_bias
    (H,), D (H,) or (H, P), norm_weight (H P,), out_weight (d_model, H P)."""

    conv_weight: Tensor
    conv_bias: Tensor
    rate: Tensor
    log_alpha: Tensor | None
    weight: Tensor | None
    dt_bias: Tensor
    D: Tensor
    norm_weight: Tensor
    out_weight: Tensor

    def decay(self, dt: Tensor, options: "Options") -> Decay:
        numbers = (self.rate, self.log_alpha, self.weight, self.dt_bias)
        return Decay(dt, *numbers, None, True, options.low, options.high)


class Options(NamedTuple):
    """low, high: limits of dt after softplus."""

    headdim: int
    n_groups: int
    eps: float
    norm_before_gate: bool
    low: float
    high: float


def slices(zxbcdt: Tensor, conv_dim: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """z, xBC and dt in it."""
    z, xBC, dt = zxbcdt.split([zxbcdt.shape[2] - conv_dim - heads, conv_dim, heads], dim=2)
    return z, xBC, dt


def of_heads(xBC: Tensor, headdim: int, n_groups: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, T, H, P), B and C (B, T, G, N) in it."""
    of_state = (xBC.shape[2] - heads * headdim) // 2
    x, B, C = xBC.split([heads * headdim, of_state, of_state], dim=2)
    return x.unflatten(2, (heads, headdim)), B.unflatten(2, (n_groups, -1)), C.unflatten(2, (n_groups, -1))


def launch_forward(
    zxbcdt: Tensor,
    w: Weights,
    before: Tensor | None,
    initial: Tensor | None,
    starts: Tensor | None,
    o: Options,
    enter: Enter | None = None,
) -> Outputs:
    """out, final states of convolution and scan; y, inverse root mean squares, chunk sums, insertion weights,
    states that enter the segments."""
    z, xBC, dt = slices(zxbcdt, len(w.conv_weight), len(w.rate))
    xBC, tail = triton_conv.launch_forward(xBC, before, w.conv_weight, w.conv_bias, starts, None, True)
    with on_device(zxbcdt):
        call = launches(*of_heads(xBC, o.headdim, o.n_groups, len(w.rate)), numbers_of(starts), None, 0)
        sums, inserts = call.decay_sums(w.decay(dt, o))
        ends = None
        if enter is not None:
            ends = call.all_ends(call.x, call.B, sums, inserts, backwards=False)
            initial = enter(ends.kept, call.sum_of(ends, backwards=False))
        y, final, borders = call.forward(sums, inserts, w.D, initial, ends)
    y = y.flatten(2)
    normed, inverse = triton_norm.launch_forward(
        y, z, w.norm_weight, o.eps, o.n_groups, o.norm_before_gate, zxbcdt.dtype
    )
    return F.linear(normed, w.out_weight), tail, final, y, inverse, sums, inserts, borders


def launch_backward(
    zxbcdt: Tensor,
    w: Weights,
    before: Tensor | None,
    starts: Tensor | None,
    kept: Kept,
    o: Options,
    dout: Tensor,
    dtail: Tensor | None,
    dfinal: Tensor | None,
    leave: Leave | None = None,
) -> Gradients:
    """Gradients of zxbcdt, conv_weight, conv_bias, of rate, log_alpha, weight and dt_bias (4, H), of D,
    norm_weight, out_weight, before (empty if None) and the initial state.

    kept: the last five of `launch_forward`.
    """
    y, inverse, sums, inserts, borders = kept
    sizes = (o.headdim, o.n_groups, len(w.rate))
    z, xBC, dt = slices(zxbcdt, len(w.conv_weight), len(w.rate))
    dzxbcdt = like(zxbcdt)
    dz, dxBC, ddt = slices(dzxbcdt, len(w.conv_weight), len(w.rate))

    normed = like(y)
    dy, _, dnorm_weight = triton_norm.launch_backward(
        dout @ w.out_weight, y, z, w.norm_weight, inverse, o.n_groups, o.norm_before_gate, dz=dz, y=normed
    )
    dy = dy.unflatten(2, (-1, o.headdim))
    conv = (before, w.conv_weight, w.conv_bias, starts, None, True)
    seen, _ = triton_conv.launch_forward(xBC, *conv)
    with on_device(zxbcdt):
        call, ends, wait = launches(*of_heads(seen, *sizes), numbers_of(starts), None, 0), None, None
        if leave is not None:
            ends = call.all_ends(dy, call.C, sums, inserts, backwards=True)
            wait = leave(call.sum_of(ends, backwards=True))
    dout_weight = dout.flatten(0, 1).t() @ normed.flatten(0, 1)  # while what others say is under way
    del normed

    dseen = like(seen)
    with on_device(zxbcdt):
        dfinal = dfinal if wait is None else wait()
        _, _, _, dsums, dinserts, dD, dinitial = call.backward(
            sums, inserts, w.D, borders, dy, dfinal, into=of_heads(dseen, *sizes), ends=ends
        )
        _, _, per_head = call.decay_sums_backward(w.decay(dt, o), dsums, dinserts, ddt=ddt)
    _, dbefore, dconv_weight, dconv_bias = triton_conv.launch_backward(dseen, dtail, xBC, *conv, dx=dxBC)
    return (
        dzxbcdt, dconv_weight, dconv_bias, per_head, dD, dnorm_weight, dout_weight, dbefore, dinitial
    )  # fmt: skip

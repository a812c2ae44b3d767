"""The public function of the fused layer: checks, the mitigation's factors."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kernels.arguments import require_shape
from kernels.ssd.checks import check_arguments, named_tensors
from kernels.ssd.discretize import per_head_factors
from kernels.ssd.heads import spread
from kernels.ssd.mitigation import Mitigation


def takes(mitigation: Mitigation) -> bool:
    """Whether the mitigation is one of the factors that the scan's kernels multiply in."""
    return not mitigation.composed and mitigation.threshold is None


def fused_mixer(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    out_weight: Tensor,
    *,
    headdim: int,
    n_groups: int,
    eps: float,
    norm_before_gate: bool,
    dt_limit: tuple[float, float],
    mitigation: Mitigation,
    conv_state: Tensor | None = None,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`causal_conv1d`, `ssd_scan`, `gated_rms_norm` and out_proj on one in_proj output, on Triton kernels.

    The same numbers as the operators one after another. For the backward pass only zxbcdt and the scan's y
    are kept: convolution and norm are computed again, and all gradients of zxbcdt are written into one
    tensor.

    Args:
        zxbcdt: (B, T, 2 d_inner + 2 G N + H), what in_proj makes: z, x, B, C and dt before its softplus.
        conv_weight: (d_inner + 2 G N, W). conv_bias: (d_inner + 2 G N,).
        dt_bias, A: (H,); A negative. D: (H,) or (H, headdim).
        norm_weight: (d_inner,). out_weight: (d_model, d_inner), of zxbcdt's dtype.
        headdim, n_groups: P and G. eps, norm_before_gate: of the norm. dt_limit: of dt after softplus.
        mitigation: one that `takes` says.
        conv_state, initial_state, document_starts: as the operators take them.
        run: stands in for `triton_mixer` once arguments are checked (kernels/context).

    Returns:
        out (B, T, d_model) in zxbcdt's dtype, the convolution's final state (B, d_inner + 2 G N, W - 1) in
        that dtype and the scan's (B, H, P, N) fp32.

    Raises:
        ValueError: for arguments that do not fit, naming them; x, B, C and dt are columns of zxbcdt.
    """
    from kernels.conv.triton_conv import MAX_WIDTH
    from kernels.mixer.launch import Options, Weights, of_heads, slices  # these import triton
    from kernels.mixer.triton_mixer import triton_mixer
    from kernels.ssd.triton_scan import check_state, raw_decay

    (batch, _, width), heads, (conv_dim, d_conv) = zxbcdt.shape, len(A), conv_weight.shape
    d_inner = heads * headdim
    d_state, rest = divmod(conv_dim - d_inner, 2 * n_groups)
    if rest or d_state < 1 or width != d_inner + conv_dim + heads:
        raise ValueError(
            f"zxbcdt has {width} columns, conv_weight {conv_dim} channels: {heads} heads of {headdim} and "
            f"{n_groups} groups need 2 * {d_inner} + 2 G N + {heads} and {d_inner} + 2 G N"
        )
    if not takes(mitigation):
        raise ValueError(f"mitigation={mitigation}: not one that the scan's kernels multiply in")
    if not 2 <= d_conv <= MAX_WIDTH:
        raise ValueError(f"conv_weight has width {d_conv}: the Triton kernels take 2 to {MAX_WIDTH}")
    _, xBC, dt = slices(zxbcdt.detach(), conv_dim, heads)
    x, B, C = of_heads(xBC, headdim, n_groups, heads)
    of_scan: dict[str, Any] = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias}
    of_scan |= {"initial_state": initial_state, "document_starts": document_starts}
    check_arguments(named_tensors(of_scan, mitigation), mitigation, dt_limit, None, 64, "triton")
    require_shape("conv_bias", conv_bias, ((conv_dim,),))
    require_shape("norm_weight", norm_weight, ((d_inner,),))
    require_shape("out_weight", out_weight, ((out_weight.shape[0], d_inner),))
    if out_weight.dtype != zxbcdt.dtype:
        raise ValueError(f"out_weight is {out_weight.dtype}, zxbcdt {zxbcdt.dtype}: must be of one dtype")
    if conv_state is not None:
        require_shape("conv_state", conv_state, ((batch, conv_dim, d_conv - 1),))
    check_state(headdim, d_state, zxbcdt.element_size())
    factors = per_head_factors(A, spread(mitigation, heads, A.device))
    decay = raw_decay(dt, factors, dt_bias, True, dt_limit)
    assert decay.rate is not None
    assert decay.bias is not None
    weights = Weights(
        conv_weight, conv_bias, decay.rate, decay.log_alpha, decay.weight, decay.bias,
        D.float().contiguous(), norm_weight, out_weight,
    )  # fmt: skip
    options = Options(headdim, n_groups, eps, norm_before_gate, decay.low, decay.high)
    out, tail, final = (run or triton_mixer)(
        zxbcdt.contiguous(),
        weights,
        None if conv_state is None else conv_state.transpose(1, 2).to(zxbcdt.dtype),
        None if initial_state is None else initial_state.float().contiguous(),
        document_starts,
        options,
    )
    return out, tail.transpose(1, 2), final

"""The public function of the fused layer: checks, the mitigation's factors."""

from torch import Tensor

from kernels.arguments import require_shape
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

    Returns:
        out (B, T, d_model) in zxbcdt's dtype, the convolution's final state (B, d_inner + 2 G N, W - 1) in
        that dtype and the scan's (B, H, P, N) fp32.

    Raises:
        ValueError: for shapes that do not fit, naming the argument.
    """
    from kernels.mixer.triton_mixer import triton_mixer  # imports triton

    (batch, length, width), heads, conv_dim = zxbcdt.shape, len(A), len(conv_weight)
    d_inner = heads * headdim
    d_state, rest = divmod(conv_dim - d_inner, 2 * n_groups)
    if rest or d_state < 1 or width != d_inner + conv_dim + heads:
        raise ValueError(
            f"zxbcdt has {width} columns, conv_weight {conv_dim} channels: {heads} heads of {headdim} and "
            f"{n_groups} groups need 2 * {d_inner} + 2 G N + {heads} and {d_inner} + 2 G N"
        )
    require_shape("D", D, ((heads,), (heads, headdim)))
    require_shape("out_weight", out_weight, ((out_weight.shape[0], d_inner),))
    require_shape("norm_weight", norm_weight, ((d_inner,),))
    if initial_state is not None:
        require_shape("initial_state", initial_state, ((batch, heads, headdim, d_state),))
    if conv_state is not None:
        require_shape("conv_state", conv_state, ((batch, conv_dim, conv_weight.shape[1] - 1),))
    if document_starts is not None:
        require_shape("document_starts", document_starts, ((batch, length),))
    if not takes(mitigation):
        raise ValueError(f"mitigation={mitigation}: not one that the scan's kernels multiply in")
    out, tail, final = triton_mixer(
        zxbcdt, conv_weight, conv_bias, dt_bias, per_head_factors(A, spread(mitigation, heads, A.device)), D,
        norm_weight, out_weight, None if conv_state is None else conv_state.transpose(1, 2), initial_state,
        document_starts, headdim, n_groups, eps, norm_before_gate, dt_limit,
    )  # fmt: skip
    return out, tail.transpose(1, 2), final

"""Parameters, bytes that a token leaves for the backward pass, and FLOPs: counted, not measured.

tests/lightning_modules/test_plan.py holds the counts to the model's own parameters and saved tensors.
"""

from conf.schema import ModelConfig, TrainConfig

STATE_CHUNK = 64  # tokens between states that the chunked scan keeps, and between those of the GPU's slabs


def matrix_parameters(c: ModelConfig) -> int:
    """Weights of matrix products in all layers, the head included."""
    layer = c.d_model * c.d_in_proj + c.d_inner * c.d_model
    return c.n_layers * layer + c.vocab_size * c.d_model


def parameters(c: ModelConfig) -> int:
    vectors = 2 * c.n_heads + (c.d_inner if c.d_has_hdim else c.n_heads)  # A_log, dt_bias, D
    vectors += c.conv_dim * (c.d_conv + 1) + c.d_inner + c.d_model  # convolution, gated norm, norm
    embedding = 0 if c.tie_embeddings else c.vocab_size * c.d_model
    return matrix_parameters(c) + c.n_layers * vectors + c.d_model + embedding


def element(config: TrainConfig) -> int:
    """Bytes of a number that a matrix product reads."""
    return 2 if config.trainer.precision == "bf16-mixed" else 4


def fused(config: TrainConfig, on_gpu: bool) -> bool:
    """Whether layers are `kernels.mixer`'s one operator, which keeps less."""
    factors = ("none", "forget_more", "delta_scale", "decay_scale")
    return on_gpu and config.mitigation.name in factors


def saved_per_token(c: ModelConfig, e: int, on_gpu: bool, fused: bool = False) -> float:
    """Bytes that one token leaves in all layers and the head until the backward pass has read them."""
    layer: float = 4 * c.d_model + 4  # residual stream and the norm's inverse, fp32
    layer += e * (c.d_model + c.d_in_proj + c.d_inner) + 4
    if not fused:
        layer += e * (c.conv_dim + c.d_inner)  # what convolution and gated norm make
    if on_gpu:
        layer += 8 * c.n_heads  # sums of log decays, weights
    else:
        layer += e * c.d_inner + (24 + 2 * e) * c.n_heads  # what states contribute; decays and weights
        layer += c.n_heads * c.headdim * c.d_state * e / STATE_CHUNK
    return c.n_layers * layer + 12 * c.d_model + e * c.d_model + 12


def workspace_per_token(c: ModelConfig, e: int, fused: bool = False) -> float:
    """Bytes of gradients on their way through a layer, beside what is still saved then."""
    if fused:  # those of y, of zxbcdt and of the convolution's output, which is made again
        return 8 * c.d_model + e * (c.d_inner + c.d_in_proj + 2 * c.conv_dim)
    return 8 * c.d_model + e * c.d_in_proj / 2


def state_bytes(c: ModelConfig, e: int) -> int:
    """The recurrent state of one row: all layers, fp32, and the convolution's inputs."""
    return c.n_layers * (4 * c.n_heads * c.headdim * c.d_state + e * c.conv_dim * (c.d_conv - 1)) + 8


def flops_per_token(c: ModelConfig) -> int:
    """Matrix products of one token forward: projections, head, scan (chunks of 64)."""
    scan = c.n_heads * (4 * c.headdim * c.d_state + 2 * STATE_CHUNK * c.headdim)
    scan += c.n_groups * 2 * STATE_CHUNK * c.d_state
    return 2 * matrix_parameters(c) + c.n_layers * scan

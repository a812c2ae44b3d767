"""A model whose states and losses are known in closed form.

One layer of two heads. Whatever is read, every token has dt = 1 and inserts the same x B^T, so that head h
holds x B^T times S_h(t) = 1 + a_h + ... + a_h^{t - 1}, a_h the retention of one token. Head 0 hardly ever
forgets (a = exp(-1e-6)), head 1 does (a = 0.9). The residual stream carries head 1's share of the normalised
output to the logit of the newline, and every other logit is zero: as head 0 grows it drowns head 1, and the
loss on newlines rises from almost nothing towards log(vocab_size). That is collapse, by hand.
"""

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from conf.load import parse
from conf.schema import TrainConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.checkpoints import save_model

TRAIN_LENGTH = 64
LOG_DECAY = np.array([-1e-6, math.log(0.9)])
NEWLINE, VOCAB, SCALE = 10, 256, 24.0
X, B = np.array([1.0, 2.0, 0.5, 1.5]), np.array([0.5, 1.0, 2.0, 0.25])
INSERTION = np.outer(X, B)  # of either head


def constructed_config(*overrides: str) -> TrainConfig:
    shape = ("d_model=8", "n_layers=1", "d_state=4", "headdim=4", "expand=1", "chunk_size=16")
    settings = [f"model.{setting}" for setting in (*shape, "tie_embeddings=false", "norm_eps=1e-12")]
    return parse(
        TrainConfig, [*settings, "data.name=documents", f"data.train_length={TRAIN_LENGTH}", *overrides]
    )


def constructed_model() -> Mamba2LM:
    config = constructed_config().model
    model = Mamba2LM(config).eval()
    mixer = model.backbone.layers[0].mixer
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (model.backbone.layers[0].norm, mixer.norm, model.backbone.norm_f):
            norm.weight.fill_(1.0)
        model.backbone.embedding.weight[:, 0] = 1.0  # the stream starts in its first channel
        mixer.in_proj.weight[: config.d_inner, 0] = 1.0  # an open gate, the same for all channels
        inputs = np.concatenate([X, X, B, np.ones(4)])  # of both heads x, then B and C
        mixer.conv1d.bias.copy_(_before_silu(torch.from_numpy(inputs)))
        mixer.dt_bias.fill_(math.log(math.e - 1))  # softplus: 1
        mixer.A_log.copy_(torch.from_numpy(np.log(-LOG_DECAY)))
        mixer.out_proj.weight[1, 4:] = torch.from_numpy(X / (X @ X))  # head 1's output, in units of x
        model.lm_head.weight[NEWLINE, 1] = SCALE
    return model


def save_constructed(path: Path, *overrides: str) -> Path:
    save_model(constructed_model(), path, constructed_config(*overrides))
    return path


def sums(t: NDArray[np.float64], log_decay: float) -> NDArray[np.float64]:
    """S(t), t tokens into the prompt."""
    return np.expm1(log_decay * t) / np.expm1(log_decay)


def newline_losses(length: int) -> NDArray[np.float64]:
    """-log p of newlines 1 .. length given all before."""
    held = np.stack([sums(np.arange(1, length + 1), rate) for rate in LOG_DECAY])
    normalised = held[1] / np.sqrt((X**2).mean() * (held**2).mean(0))  # head 1, in units of x, after RMSNorm
    stream = 1 / np.sqrt((1 + normalised**2) / 8)  # RMSNorm of the channels 1, normalised, 0, 0 ...
    return np.log1p((VOCAB - 1) * np.exp(-SCALE * normalised * stream))


def _before_silu(y: torch.Tensor) -> torch.Tensor:
    """The x with silu(x) = y, for positive y, by Newton's method."""
    x = y.double().clone() + 0.3
    for _ in range(50):
        sigmoid = torch.sigmoid(x)
        x -= (x * sigmoid - y) / (sigmoid * (1 + x * (1 - sigmoid)))
    return x

"""AdamW with Mamba-2's decay groups, under the warmup-stable-decay schedule."""

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from conf.schema import OptimConfig
from lightning_modules.schedule import lr_factor

# Beside norms and biases. They set how long a head remembers: pulled towards zero they all remember alike.
NO_DECAY = ("A_log", "D", "dt_bias")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: matrices and convolutions decay; A_log, D, dt_bias, norms and biases do not.

    Each group carries its parameters' names under `param_names`. A shared parameter appears once.
    """
    groups: dict[str, dict[str, Any]] = {
        "decay": {"weight_decay": weight_decay, "params": [], "param_names": []},
        "no_decay": {"weight_decay": 0.0, "params": [], "param_names": []},
    }
    for name, parameter in model.named_parameters():
        decays = len(full_shape(parameter)) >= 2 and name.rpartition(".")[2] not in NO_DECAY
        group = groups["decay" if decays else "no_decay"]
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The parameter's shape, also where ZeRO-3 keeps but a share of it here."""
    return getattr(parameter, "ds_shape", parameter.shape)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, max_steps: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: lr_factor(step, config, max_steps))

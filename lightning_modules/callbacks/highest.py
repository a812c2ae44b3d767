"""A number that all ranks agree on."""

import lightning.pytorch as pl
import torch


def highest(trainer: pl.Trainer, value: int) -> int:
    """The highest value of all ranks, which call this together."""
    if trainer.world_size == 1:
        return value
    tensor = torch.tensor(value, device=trainer.strategy.root_device)  # NCCL knows no other device
    return int(trainer.strategy.reduce(tensor, reduce_op="max"))

"""Tensors with a value for each row of an optimizer step, shared out among ranks and micro-batches.

Row order is that of the step's samples (data/batches.py): micro-batch by micro-batch, and within one rank by
rank. Saved in this order they serve any number of ranks. Ranks of a context group share their rows: the first
of them speaks for all, since it alone holds the whole state (kernels/context).
"""

import lightning.pytorch as pl
import torch
from torch import Tensor


def gather_rows(parts: list[Tensor], trainer: pl.Trainer) -> Tensor:
    """The whole step's rows, on the CPU of every rank, from this rank's micro-batches (rows, ...) each.

    All ranks call this together.
    """
    own = torch.stack(parts)
    if trainer.world_size == 1:
        return own.flatten(0, 1).cpu()
    # As bytes: not every backend moves every dtype.
    shares = trainer.strategy.all_gather(own.contiguous().view(torch.uint8)).cpu().view(own.dtype)
    return shares[:: _context(trainer)].transpose(0, 1).flatten(0, 2)


def own_rows(rows: Tensor, trainer: pl.Trainer) -> list[Tensor]:
    """The inverse of `gather_rows`: this rank's micro-batches."""
    size = _context(trainer)
    shares = rows.unflatten(0, (trainer.accumulate_grad_batches, trainer.world_size // size, -1))
    return [share.clone() for share in shares[:, trainer.global_rank // size]]


def _context(trainer: pl.Trainer) -> int:
    """Ranks of a context group."""
    if trainer.world_size == 1:
        return 1
    return trainer.lightning_module.config.trainer.context_parallel  # type: ignore[union-attr, return-value]

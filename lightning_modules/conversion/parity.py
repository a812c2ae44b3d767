"""Whether two readings of a checkpoint are the same model: logits on fixed tokens, in fp32."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.conversion.parameters import Parameters

ROWS = 2
TOLERANCE = 1e-2  # of the largest logit: rounding, between implementations, over many layers


@dataclass(frozen=True)
class Comparison:
    """Two readings and the largest difference of their logits."""

    first: str
    second: str
    max_difference: float
    largest_logit: float

    @property
    def agrees(self) -> bool:
        return self.max_difference <= TOLERANCE * self.largest_logit

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def fixed_tokens(vocab_size: int, length: int) -> Tensor:
    """(2, length) int64, the same for every model of a vocabulary."""
    return torch.randint(vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def our_logits(parameters: Parameters, ids: Tensor) -> Tensor:
    return parameters.model()(ids).logits


@torch.inference_mode()
def transformers_logits(folder: Path, ids: Tensor) -> Tensor:
    """Of the published directory, as transformers reads it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # its advice on kernels for GPUs
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    return model.eval()(ids, use_cache=False).logits


def compare(first: str, a: Tensor, second: str, b: Tensor) -> Comparison:
    """Raises ValueError where the two are not the same model, within rounding."""
    found = Comparison(first, second, float((a - b).abs().max()), float(a.abs().max()))
    if not found.agrees:
        raise ValueError(
            f"parity: logits of {first} and {second} differ by {found.max_difference:.3g} (largest "
            f"{found.largest_logit:.3g}): they are not the same model; nothing was written"
        )
    return found

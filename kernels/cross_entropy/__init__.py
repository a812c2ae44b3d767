"""Output projection and cross-entropy in slices of tokens."""

from kernels.cross_entropy.recall import Recall
from kernels.cross_entropy.sliced import linear_cross_entropy

__all__ = ["Recall", "linear_cross_entropy"]

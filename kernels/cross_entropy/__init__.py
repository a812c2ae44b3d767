"""Output projection and cross-entropy in slices of tokens."""

from kernels.cross_entropy.sliced import linear_cross_entropy

__all__ = ["linear_cross_entropy"]

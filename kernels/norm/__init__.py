"""Gated root-mean-square normalisation."""

from kernels.norm.gated import gated_rms_norm
from kernels.norm.naive import naive_gated_rms_norm
from kernels.norm.rms import rms_norm

__all__ = ["gated_rms_norm", "naive_gated_rms_norm", "rms_norm"]

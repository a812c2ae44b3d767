"""Root-mean-square normalisation: plain, gated, of a sum."""

from kernels.norm.add import add_rms_norm
from kernels.norm.gated import gated_rms_norm
from kernels.norm.naive import naive_gated_rms_norm
from kernels.norm.rms import rms_norm

__all__ = ["add_rms_norm", "gated_rms_norm", "naive_gated_rms_norm", "rms_norm"]

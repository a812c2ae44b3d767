"""Causal depthwise convolution with state in and out."""

from kernels.conv.causal import causal_conv1d
from kernels.conv.naive import naive_causal_conv1d

__all__ = ["causal_conv1d", "naive_causal_conv1d"]

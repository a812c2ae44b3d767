"""Compiled pointwise kernels for the CPU, beside the PyTorch forms of the same passes."""

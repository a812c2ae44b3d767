"""What stands between a Mamba-2 layer's two projections, and the second of them, as one operator."""

from kernels.mixer.fused import fused_mixer, takes

__all__ = ["fused_mixer", "takes"]

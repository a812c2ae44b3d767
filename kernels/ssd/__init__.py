"""The state-space duality (SSD) scan of Mamba-2. See README.md for the mathematics."""

from kernels.ssd.mitigation import Mitigation
from kernels.ssd.scan import ssd_scan

__all__ = ["Mitigation", "ssd_scan"]

"""The state-space duality (SSD) scan of Mamba-2. See README.md for the mathematics."""

from kernels.ssd.mitigation import Mitigation
from kernels.ssd.scan import ssd_scan
from kernels.ssd.step import ssd_step
from kernels.ssd.token import ssd_token
from kernels.ssd.window import State, Window, map_state, zero_state

__all__ = ["Mitigation", "State", "Window", "map_state", "ssd_scan", "ssd_step", "ssd_token", "zero_state"]

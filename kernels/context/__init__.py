"""Operators on a sequence that is sharded over the ranks of a context group.

`context_conv1d` and `context_scan` stand in for `causal_conv1d` and `ssd_scan`: the same arguments of this
rank's piece, the same results for it. States are the whole sequence's: `initial_state` before the first
rank's first token, the final state after the last rank's last.
"""

from kernels.context.conv import context_conv1d
from kernels.context.group import Context
from kernels.context.scan import context_scan, refusal

__all__ = ["Context", "context_conv1d", "context_scan", "refusal"]

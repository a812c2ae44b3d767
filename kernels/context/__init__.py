"""Operators on a sequence that is sharded over the ranks of a context group."""

from kernels.context.context import Context
from kernels.context.scan import refusal

__all__ = ["Context", "refusal"]

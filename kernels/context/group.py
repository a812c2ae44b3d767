"""One rank's place among those that share a sequence, and all that they say to each other."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Tokens of a piece, for every other rank, below which the all-gather takes longer than correcting y in a
# layer that is not fused. At 3 TB/s three corrections take 15 ns a token; a 370M model's three all-gathers
# take 26 us for every other rank at 300 GB/s and 5 us a step.
OVERLAP_TOKENS = 2000


@dataclass
class Ranks:
    """The ranks of `group`: rank r holds the r-th of `size` pieces of equal length.

    All ranks call everything together, in the same order, and so do their backward passes.

    overlap: scan pieces from zero while summaries travel, and correct y afterwards; None: where that pays,
        if the layer is not fused.
    bytes_sent: what this rank has handed to collectives, backward passes included.
    """

    group: dist.ProcessGroup
    overlap: bool | None = None
    bytes_sent: int = 0

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    def scans_before_merging(self, length: int) -> bool:
        """Whether to overlap the all-gather with the scan of a piece of `length` tokens."""
        if self.overlap is not None:
            return self.overlap
        return length < OVERLAP_TOKENS * (self.size - 1)

    def all_gather(self, own: Tensor) -> Tensor:
        """Every rank's tensor, of equal shapes: (size, *shape)."""
        return self.start_all_gather(own)()

    def start_all_gather(self, own: Tensor) -> Callable[[], Tensor]:
        """The same, begun; the function that is returned waits for the end."""
        own = own.contiguous()
        everyone = own.new_empty(self.size, *own.shape)
        self.bytes_sent += own.nbytes
        work = dist.all_gather(list(everyone), own, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return everyone

        return wait

    def shift(self, own: Tensor, by: int) -> Tensor:
        """The tensor of the rank `by` places before this one, the ranks standing in a ring; never a view."""
        if self.size == 1:
            return own.clone()
        own, received = own.contiguous(), torch.empty_like(own, memory_format=torch.contiguous_format)
        after, before = ((self.rank + step) % self.size for step in (by, -by))
        self.bytes_sent += own.nbytes
        exchange = [
            dist.P2POp(dist.isend, own, group=self.group, group_peer=after),
            dist.P2POp(dist.irecv, received, group=self.group, group_peer=before),
        ]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        return received

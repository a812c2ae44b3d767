"""What a context group costs: measured on this machine, and projected by a model of network and device.

    python -m kernels.context.bench                          # 1 and 2 ranks, gloo, one CPU thread each
    python -m kernels.context.bench ranks=4 length=65536
    python -m kernels.context.bench project=true             # the tables of docs/scaling.md

Measured: a layer's convolution and scan, forward and backward, T tokens on one rank against T / K on each of
K. A group of one rank does all of the sums and none of the waiting: it tells one from the other.
"""

import os
import sys
import time
from dataclasses import dataclass

from conf.fields import option, require, require_at_least
from conf.load import from_command_line


@dataclass(kw_only=True)
class ContextBenchConfig:
    """What is measured."""

    ranks: int = option(2, "processes of the context group, one thread each")
    length: int = option(32768, "tokens of the row, over all ranks")
    heads: int = option(8, "H")
    headdim: int = option(32, "P")
    d_state: int = option(64, "N")
    repeats: int = option(5, "measurements; the fastest counts")
    project: bool = option(False, "print the projection of docs/scaling.md instead")

    def __post_init__(self) -> None:
        require_at_least("config", self, 1, "ranks", "length", "heads", "headdim", "d_state", "repeats")
        remedy = f"must be a multiple of ranks={self.ranks}"
        require(self.length % self.ranks == 0, "length", self.length, remedy)


@dataclass(frozen=True)
class Network:
    """A collective of m bytes a rank over K ranks takes steps * latency + (K - 1) m / bandwidth."""

    name: str
    bandwidth: float  # bytes a second that a rank receives
    latency: float  # seconds a step of a collective

    def all_gather(self, size: int, nbytes: float) -> float:
        return (size - 1) * (self.latency + nbytes / self.bandwidth)  # a ring

    def shift(self, nbytes: float) -> float:
        return self.latency + nbytes / self.bandwidth

    def all_reduce(self, size: int, nbytes: float) -> float:
        return 2 * (size - 1).bit_length() * self.latency + 2 * (size - 1) / size * nbytes / self.bandwidth


NODE = Network("8 GPUs of one node, NVLink", 300e9, 5e-6)
NODES = Network("nodes of 8 GPUs, 400 Gb/s a GPU, all adapters at once", 300e9, 10e-6)
ETHERNET = Network("nodes with 100 Gb/s each", 12.5e9, 30e-6)


@dataclass(frozen=True)
class Layer:
    """mamba2-370m: a layer's sizes, FLOPs and messages.

    flops: FLOPs a second that the device is assumed to reach over the whole step.
    """

    layers: int = 48
    d_model: int = 1024
    heads: int = 32
    headdim: int = 64
    d_state: int = 128
    parameters: float = 368e6
    flops: float = 300e12

    @property
    def state_bytes(self) -> int:
        return 4 * (self.heads * self.headdim * self.d_state + self.heads)

    @property
    def halo_bytes(self) -> int:
        return 2 * 3 * (self.heads * self.headdim + 2 * self.d_state)

    def step_seconds(self, tokens: int) -> float:
        """Forward, once more for the backward pass, and that: 8 FLOPs a token and parameter of one layer."""
        return 8 * self.parameters / self.layers * tokens / self.flops

    def waiting_seconds(self, size: int, network: Network) -> float:
        """Two forward passes and one backward, nothing hidden."""
        return 3 * (network.all_gather(size, self.state_bytes) + network.shift(self.halo_bytes))


def efficiency(layer: Layer, size: int, tokens: int, network: Network) -> float:
    """Of `size` ranks with `tokens` each, against one rank alone with as many. The sums S and R are not
    counted: where rows are few, one device makes them too, of all its own segments but one."""
    work = layer.step_seconds(tokens)
    return work / (work + layer.waiting_seconds(size, network))


def project() -> None:
    layer = Layer()
    for network, sizes in ((NODE, (2, 4, 8)), (NODES, (16, 32, 64)), (ETHERNET, (2, 4, 8, 16))):
        print(f"\n{network.name}: efficiency by ranks K (columns) and tokens a rank (rows)")
        print(f"{'':>10}" + "".join(f"{size:>9}" for size in sizes))
        for tokens in (4096, 16384, 65536, 131072):
            row = "".join(f"{efficiency(layer, size, tokens, network):>9.0%}" for size in sizes)
            print(f"{tokens:>10,}{row}")
    print("\n1,048,576 tokens a sequence, GPUs = data x context:")
    print(f"{'GPUs':>6}{'context':>9}{'data':>6}{'tokens/step':>13}{'efficiency':>12}{'tokens/s':>13}")
    for gpus, size in ((8, 8), (64, 8), (64, 32), (256, 8), (256, 32), (1024, 8), (1024, 32), (1024, 128)):
        data, tokens = gpus // size, 2**20 // size
        alone = layer.layers * layer.step_seconds(tokens)
        step = alone / efficiency(layer, size, tokens, NODE if size <= 8 else NODES)
        step += (NODE if gpus <= 8 else NODES).all_reduce(gpus, 4 * layer.parameters)
        rate = data * 2**20 / step
        print(f"{gpus:>6}{size:>9}{data:>6}{data * 2**20:>13,}{alone / step:>12.0%}{rate:>13,.0f}")


def main(argv: list[str] | None = None) -> int:
    config = from_command_line(ContextBenchConfig, __doc__ or "", sys.argv[1:] if argv is None else argv)
    if config.project:
        project()
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch.multiprocessing as multiprocessing

    multiprocessing.spawn(_measure, (config, _free_port()), nprocs=config.ranks)
    return 0


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _measure(rank: int, config: ContextBenchConfig, port: int) -> None:
    """One rank's part; the first prints."""
    import torch
    import torch.distributed as dist

    from kernels.context import Context

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=config.ranks)
    first, everyone = dist.new_group([0]), dist.group.WORLD
    assert everyone is not None
    if rank == 0:
        assert first is not None
        print(f"{config.length:,} tokens, a layer's convolution and scan, forward and backward:")
        plain = _seconds(config, config.length, None)
        print(f"  one rank                      {plain[0]:7.3f} s, of the processor {plain[1]:7.3f} s")
        sums = _seconds(config, config.length, Context(first))
        print(f"  and the sums S and R          {sums[0]:7.3f} s, of the processor {sums[1]:7.3f} s")
    dist.barrier()
    context = Context(everyone)
    piece = _seconds(config, config.length // config.ranks, context)
    before = context.bytes_sent
    _step(config, config.length // config.ranks, context)
    used = torch.tensor(piece[1])
    dist.all_reduce(used)
    if rank == 0:
        print(
            f"  {config.ranks} ranks                       {piece[0]:7.3f} s, of all processors {used:6.3f} s"
        )
        clock, work = plain[0] / piece[0] / config.ranks, plain[1] / used
        print(f"  efficiency: {clock:.0%} by the clock, {work:.0%} by work")
        print(f"  bytes that a rank sends: {context.bytes_sent - before:,}")
    dist.barrier()
    dist.destroy_process_group()


def _seconds(config: ContextBenchConfig, length: int, context: object) -> tuple[float, float]:
    """By the clock, and of this process's threads: what others take from the machine shows in the first."""
    walls, works = [], []
    for _ in range(config.repeats):
        wall, work = time.perf_counter(), time.process_time()
        _step(config, length, context)
        walls.append(time.perf_counter() - wall)
        works.append(time.process_time() - work)
    return min(walls), min(works)


def _step(config: ContextBenchConfig, length: int, context: object) -> None:
    import torch

    from kernels.context import Context
    from kernels.conv import causal_conv1d
    from kernels.ssd import ssd_scan

    convolve, scan = causal_conv1d, ssd_scan
    if isinstance(context, Context):
        convolve, scan = context.causal_conv1d, context.ssd_scan  # type: ignore[assignment]
    torch.manual_seed(0)
    heads, inner, state = config.heads, config.heads * config.headdim, config.d_state
    u = torch.randn(1, length, inner + 2 * state, requires_grad=True)
    dt = torch.randn(1, length, heads, requires_grad=True)
    mixed, _ = convolve(u, torch.randn(inner + 2 * state, 4, requires_grad=True), None)
    x, B, C = mixed.split([inner, state, state], -1)
    y, _ = scan(
        x.unflatten(-1, (heads, -1)), dt, -torch.ones(heads), B[:, :, None], C[:, :, None], dt_softplus=True
    )
    y.sum().backward()


if __name__ == "__main__":
    sys.exit(main())

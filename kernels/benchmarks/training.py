"""The suite `training`: a model's training step at several lengths, on our kernels and on others.

    python -m kernels.bench suite=training [lengths=[8192,65536,262144]] [at_once=32768] [peers=[mamba_ssm]]

Forward, backward, clipping and AdamW of one micro-batch under bf16 autocast (fp32 without a GPU). Rows no
longer than `at_once` tokens are read whole, as many together as make it up; longer ones in segments of it,
with exact gradients. Every contender takes the same path; a peer differs in what stands in a layer:

    mamba_ssm    in_proj, then the fused convolution, scan, gated norm and out_proj of state-spaces/mamba

share: the model's FLOPs, those of recomputed segments not counted, over a large matrix product's. host: the
part of a step after which all of it is launched; near 100% the device waits for the host. GiB: what PyTorch
allocated; of a graph, which keeps its memory between steps: what it reserved.
"""

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from conf.load import user_errors
from conf.schema import ModelConfig, option, require

PEERS = ("mamba_ssm",)


@dataclass(kw_only=True)
class BenchConfig:
    """Model, lengths and repetitions."""

    suite: Literal["training"] = option("training", "this suite")
    d_model: int = option(1024, "width")
    n_layers: int = option(48, "layers")
    d_state: int = option(128, "state size")
    headdim: int = option(64, "channels per head")
    vocab_size: int = option(50288, "vocabulary")
    lengths: list[int] = option([8192, 65536, 262144], "tokens per row")
    at_once: int = option(32768, "tokens held at a time: rows of a micro-batch, or segment of a longer row")
    cuda_graphs: bool = option(False, "launch forward and backward as one CUDA graph, whoever's the layers")
    rounds: int = option(3, "timed steps, after one that compiles and tunes")
    peers: list[str] = option(["mamba_ssm"], "whom to compare with")
    json: str = option("runs/bench-training.json", "where the numbers go")

    def __post_init__(self) -> None:
        require(self.at_once >= 1, "at_once", self.at_once, "must be at least 1")
        require(bool(self.lengths), "lengths", self.lengths, "name one at least")
        for length in self.lengths:
            fits = length >= 1 and (self.at_once % length == 0 or length % self.at_once == 0)
            require(
                fits, "lengths", self.lengths, f"must divide at_once={self.at_once} or be multiples of it"
            )
        require(self.rounds >= 1, "rounds", self.rounds, "must be at least 1")
        for peer in self.peers:
            require(peer in PEERS, "peers", self.peers, f"choose from [{', '.join(PEERS)}]")

    def model(self) -> ModelConfig:
        return ModelConfig(
            d_model=self.d_model,
            n_layers=self.n_layers,
            d_state=self.d_state,
            headdim=self.headdim,
            vocab_size=self.vocab_size,
        )


@dataclass(frozen=True)
class Row:
    """seconds: median of a step; host_seconds: until all of it is launched. peak_gib: weights, gradients and
    moments included. None: out of memory."""

    system: str
    length: int
    rows: int
    segment: int | None
    graph: bool
    seconds: float | None
    host_seconds: float | None
    tokens_per_second: float | None
    peak_gib: float | None
    flops_per_second: float | None


def measure(config: BenchConfig) -> list[Row]:
    """Every system at every length, one model at a time."""
    import torch

    measured = []
    for length in config.lengths:
        for system in ("ours", *config.peers):
            try:
                measured.append(_measure(config, system, length))
            except torch.cuda.OutOfMemoryError:
                measured.append(Row(system, length, *_split(config, length), config.cuda_graphs, *[None] * 5))
            print(line(measured[-1]), flush=True)
    return measured


def _split(config: BenchConfig, length: int) -> tuple[int, int | None]:
    """Rows of a micro-batch, and tokens of a segment where a row is read in several."""
    return max(1, config.at_once // length), config.at_once if length > config.at_once else None


def _measure(config: BenchConfig, system: str, length: int) -> Row:
    import torch

    from lightning_modules.backbone import Mamba2LM
    from lightning_modules.graphs import GraphedLoss
    from lightning_modules.memory import peak_memory_mib
    from lightning_modules.planning.sizes import flops_per_token
    from lightning_modules.segments import segmented_losses

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    rows, segment = _split(config, length)
    torch.manual_seed(0)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    model = Mamba2LM(config.model()).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(config.vocab_size, (rows, length + 1), device=device)
    batch = {"ids": ids[:, :-1], "targets": ids[:, 1:]}

    def eager(batch: dict[str, Any], state: Any) -> tuple[Any, Any]:
        losses, final = segmented_losses(model, batch["ids"], batch["targets"], state, length=segment)
        return losses.mean(), final

    graphed = GraphedLoss(eager, list(model.parameters()), list(batch)) if config.cuda_graphs else None

    def step() -> None:
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss, _ = (graphed or eager)(batch, None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        launched = time.perf_counter() - start
        if on_gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start, launched))

    times: list[tuple[float, float]] = []
    with LAYERS[system]():
        step()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(config.rounds):
            step()
    seconds, host = (statistics.median(column) for column in zip(*times[1:], strict=True))
    speed = rows * length / seconds
    peak = peak_memory_mib(device, graphed=config.cuda_graphs) / 1024
    flops = 3 * flops_per_token(config.model())  # forward, backward as two
    return Row(system, length, rows, segment, config.cuda_graphs, seconds, host, speed, peak, speed * flops)


@contextlib.contextmanager
def _mamba_ssm() -> Iterator[None]:
    """Our model with its layers on mamba_ssm's fused path. States go from segment to segment; the three
    tokens that its convolution should see across a border it takes for zero, which costs it nothing."""
    import torch.nn.functional as F
    from torch import Tensor

    from kernels.benchmarks.rivals import fused_mamba_layer
    from lightning_modules.layer import Mamba2
    from lightning_modules.state import LayerState

    def forward(self: Mamba2, u: Tensor, state: LayerState, *rest: Any) -> tuple[Tensor, LayerState]:
        mixed = F.linear(u, self.in_proj.weight)
        out, final = fused_mamba_layer(self, mixed, 256, initial_states=state.ssm, return_final_states=True)
        return out, LayerState(conv=state.conv, ssm=final.float())

    with mock.patch.object(Mamba2, "forward", forward):
        yield


LAYERS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "ours": contextlib.nullcontext,
    "mamba_ssm": _mamba_ssm,
}


def line(row: Row) -> str:
    cut = f"segments of {row.segment:,}" if row.segment else "read whole"
    what = f"{row.system:10} {row.rows} x {row.length:,} {cut}{', as a graph' if row.graph else ''}"
    if row.seconds is None:
        return f"{what}: out of memory"
    return f"{what}: {row.tokens_per_second:,.0f} tokens/s, {row.peak_gib:.1f} GiB"


def show(measured: Sequence[Row], product: float | None) -> None:
    """product: FLOP/s of a large bf16 matrix product here; None: without a GPU."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="training step: forward, backward, clipping, AdamW")
    for name in (
        "length",
        "rows",
        "segment",
        "launched",
        "system",
        "tokens/s",
        "host",
        "TFLOP/s",
        "share",
        "GiB",
        "ours",
    ):
        table.add_column(name, justify="left" if name in ("launched", "system") else "right", no_wrap=True)
    ours = {row.length: row.tokens_per_second for row in measured if row.system == "ours"}
    for row in measured:
        cells = [f"{row.length:,}", str(row.rows), f"{row.segment:,}" if row.segment else ""]
        cells += ["as a graph" if row.graph else "by kernel", row.system]
        if not row.seconds or not row.host_seconds or not row.tokens_per_second or not row.flops_per_second:
            table.add_row(*cells, "out of memory")
            continue
        share = f"{row.flops_per_second / product:.0%}" if product else ""
        own = ours[row.length]
        ratio = f"{own / row.tokens_per_second:.2f}x" if row.system != "ours" and own else ""
        cells += [f"{row.tokens_per_second:,.0f}", f"{row.host_seconds / row.seconds:.0%}"]
        table.add_row(*cells, f"{row.flops_per_second / 1e12:.0f}", share, f"{row.peak_gib:.1f}", ratio)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def run(config: BenchConfig) -> None:
    """Measure, print the table and write the numbers."""
    import torch

    on_gpu = torch.cuda.is_available()
    with user_errors():
        require(on_gpu or not config.cuda_graphs, "cuda_graphs", "true", "needs a CUDA device: leave it out")
    product, device = None, "cpu"
    if on_gpu:
        from kernels.benchmarks.timing import machine

        here = machine()
        product, device = here.matmul, here.name
    measured = measure(config)
    show(measured, product)
    record = {
        "config": asdict(config),
        "torch": torch.__version__,
        "device": device,
        "matmul_flops_per_second": product,
        "rows": [asdict(row) for row in measured],
    }
    path = Path(config.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2))
    print(f"numbers: {path}")

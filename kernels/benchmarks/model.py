"""The suite `model`: training step of a small Mamba-2 on this machine, ours against peers, in one process.

    python -m kernels.bench suite=model [d_model=256] [length=2048] [rounds=7] [peers=[plain]] [json=PATH]

Each round times every contender once, so a machine whose speed drifts drifts under all of them. Reported:
median tokens/s, the ratio to the best variant of each peer, peak memory (a process each), and the share of
the bound set by the model's matrix products at the speed this machine reaches on large ones. Peers:

    transformers  its Mamba2ForCausalLM on its PyTorch path
    plain         the same backbone with an einsum scan, F.conv1d and F.rms_norm, gradients by autograd
    einsum        the same backbone with only the scan replaced by einsums
"""

import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from conf.schema import ModelConfig, option, require

PEERS = ("transformers", "plain", "einsum")


@dataclass(kw_only=True)
class BenchConfig:
    """Shape and repetitions."""

    suite: Literal["model"] = option("model", "this suite; suite=ops measures the operators on a GPU")
    d_model: int = option(256, "width")
    n_layers: int = option(2, "layers")
    d_state: int = option(128, "state size")
    headdim: int = option(64, "channels per head")
    vocab_size: int = option(256, "vocabulary")
    batch: int = option(1, "sequences")
    length: int = option(2048, "tokens per sequence")
    rounds: int = option(7, "times each contender is run")
    peers: list[str] = option(["transformers", "plain", "einsum"], "whom to compare with")
    json: str = option("runs/bench.json", "where the numbers go")

    def __post_init__(self) -> None:
        require(self.rounds >= 1, "rounds", self.rounds, "must be at least 1")
        require(
            self.batch >= 1 and self.length >= 1, "length", self.length, "batch and length must be at least 1"
        )
        require(
            self.length % 256 == 0, "length", self.length, "must be a multiple of 256, which the peers need"
        )
        for peer in self.peers:
            require(peer in PEERS, "peers", self.peers, f"choose from [{', '.join(PEERS)}]")

    def model(self, chunk_size: int) -> ModelConfig:
        return ModelConfig(
            d_model=self.d_model,
            n_layers=self.n_layers,
            d_state=self.d_state,
            headdim=self.headdim,
            vocab_size=self.vocab_size,
            chunk_size=chunk_size,
        )


@dataclass(frozen=True)
class Contender:
    """One implementation, precision and chunk size."""

    system: str
    precision: str
    chunk_size: int

    def step(self, config: BenchConfig) -> Callable[[], None]:
        """A function that runs one forward and backward pass."""
        import torch

        from kernels.benchmarks.model_peers import PLAIN, replaced, transformers_model
        from lightning_modules.backbone import Mamba2LM

        torch.manual_seed(0)
        shape = config.model(self.chunk_size)
        ids = torch.randint(0, config.vocab_size, (config.batch, config.length))
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")
        if self.system == "transformers":
            peer = transformers_model(shape)

            def run() -> None:
                peer.zero_grad()
                with autocast:
                    loss = peer(input_ids=ids, labels=ids).loss
                loss.backward()

            return run
        model = Mamba2LM(shape)

        def run_ours() -> None:
            model.zero_grad()
            with autocast:
                losses, _ = model.token_losses(ids, ids)
            losses.mean().backward()

        def run_replaced() -> None:
            with replaced(*(PLAIN if self.system == "plain" else ["ssd_scan"])):
                run_ours()

        return run_ours if self.system == "ours" else run_replaced


def contenders(config: BenchConfig) -> list[Contender]:
    listed = [Contender("ours", precision, 64) for precision in ("fp32", "bf16")]
    for peer in config.peers:
        listed += [Contender(peer, p, chunk) for p in ("fp32", "bf16") for chunk in (64, 256)]
    return listed


def matmul_flops_per_token(model: ModelConfig) -> float:
    """Forward and backward matrix-product FLOPs a token: projections, head, and the scan at chunk 64."""
    projections = 2 * model.d_model * (model.d_in_proj + model.d_inner)
    inside = 2 * model.chunk_size * model.d_inner  # mixer times inputs, a full square
    states = 2 * 2 * model.d_inner * model.d_state  # build the state, read it
    scores = 2 * model.chunk_size * model.n_groups * model.d_state
    head = 2 * model.d_model * model.vocab_size
    return 3.0 * (model.n_layers * (projections + inside + states + scores) + head)


def matmul_speed(precision: str) -> float:
    """FLOP/s of a large square product, best of several."""
    import torch

    a = torch.randn(1536, 1536, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    best = min(_seconds(lambda: a @ a) for _ in range(12))
    return 2 * 1536**3 / best


def peak_memory(contender: Contender, config: BenchConfig) -> float:
    """MiB that two training steps add to the process at their peak, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (contender, config))


def _peak_memory(contender: Contender, config: BenchConfig) -> float:
    contender.step(replace(config, length=256))()  # libraries and thread pools are loaded
    step = contender.step(config)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over from here
    step()
    step()
    return (_resident("VmHWM") - before) / 1024


def _resident(name: str) -> int:
    """A line of this process's memory status, KiB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith(f"{name}:")))


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(config: BenchConfig) -> list[dict[str, Any]]:
    """One row per contender."""
    from rich.progress import track

    listed = contenders(config)
    steps = {c: c.step(config) for c in listed}
    times: dict[Contender, list[float]] = {c: [] for c in listed}
    for step in steps.values():
        step()
    for _ in track(range(config.rounds), "timing", transient=True):
        for contender in listed:
            times[contender].append(_seconds(steps[contender]))
    tokens = config.batch * config.length
    bound = {p: matmul_speed(p) / matmul_flops_per_token(config.model(64)) for p in ("fp32", "bf16")}
    rows = []
    for contender in track(listed, "memory", transient=True):
        median = statistics.median(times[contender])
        rows.append(
            asdict(contender)
            | {
                "tokens_per_second": tokens / median,
                "best_tokens_per_second": tokens / min(times[contender]),
                "share_of_matmul_bound": tokens / median / bound[contender.precision],
                "peak_mib": peak_memory(contender, config),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    peers = sorted({r["system"] for r in rows} - {"ours"}, reverse=True)
    best = {p: max(r["tokens_per_second"] for r in rows if r["system"] == p) for p in peers}
    table = Table(title="training step, forward + backward")
    for name in ("system", "precision", "chunk", "tokens/s", "of matmul bound", "peak MiB"):
        table.add_column(name, justify="left" if name == "system" else "right")
    for peer in peers:
        table.add_column(f"x {peer}", justify="right")
    for r in rows:
        cells = [r["system"], r["precision"], str(r["chunk_size"]), f"{r['tokens_per_second']:,.0f}"]
        cells += [f"{r['share_of_matmul_bound']:.0%}", f"{r['peak_mib']:.0f}"]
        table.add_row(*cells, *[f"{r['tokens_per_second'] / best[p]:.2f}" for p in peers])
    Console().print(table)


def run(config: BenchConfig) -> None:
    """Measure, print the table and write the numbers."""
    import torch

    from lightning_modules.cpu import keep_freed_memory

    keep_freed_memory()
    rows = measure(config)
    show(rows)
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    record = {"config": asdict(config), "torch": torch.__version__, "machine": machine, "rows": rows}
    path = Path(config.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2))
    print(f"numbers: {path}")

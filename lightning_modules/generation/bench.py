"""Speed behind prompts of different lengths: rounds in turn, so that what disturbs one disturbs all."""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from conf.generate_schema import DecodingConfig, GenerationBenchConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.checkpoints import load_model
from lightning_modules.evaluation.streaming import Reader
from lightning_modules.generation.sampling import Sampler
from lightning_modules.generation.step import Step, make_step
from lightning_modules.guests.guest import Guest, GuestState
from lightning_modules.guests.load import guest_config, is_guest, load_guest
from lightning_modules.measuring import choose_device, require_writable, show_progress, to_json
from lightning_modules.mitigations import build_mitigation
from lightning_modules.run_dir import write_text

BLOCK = 4096  # random tokens are drawn in blocks, each from a generator of its own


class GuestStep:
    """One token of every row of a guest, and the likeliest next; the states are values of its own."""

    def __init__(self, guest: Guest, state: GuestState, sampler: Sampler) -> None:
        self.guest, self.state, self.sampler = guest, state, sampler

    @torch.no_grad()
    def __call__(self, ids: Tensor, active: Tensor, uniforms: Tensor) -> Tensor:
        device = self.state.position.device
        hidden, self.state = self.guest.hidden(ids[:, None].to(device), self.state)
        return self.sampler(self.guest.lm_head(hidden[:, 0]), uniforms.to(device))


AnyStep = Step | GuestStep


def bench(config: GenerationBenchConfig) -> dict[str, Any]:
    """Measure, print a table; returns what `output` holds."""
    if config.output is not None:
        require_writable("output", config.output)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = _model(config, choose_device(config.device))
    rules = build_mitigation(config.mitigation, model.config)
    # Begins a round behind a position. Of a guest anew each time: layers of attention make its state grow.
    begin: dict[int, Callable[[], AnyStep]] = {}
    state_bytes: dict[int, int] = {}
    for position in config.positions:
        with show_progress(f"reading {position:,} tokens", config.batch_size * position) as on_tokens:
            reader = Reader(model, rules, config.segment_length, on_tokens)
            source = random_tokens(config.seed, config.batch_size, model.config.vocab_size)
            state, _ = reader.read(source, None, 0, position, keep=1)
        assert state is not None
        state_bytes[position] = state.nbytes
        sampler = Sampler(DecodingConfig(), model.config.vocab_size)
        if isinstance(state, GuestState):
            assert isinstance(model, Guest)
            begin[position] = partial(GuestStep, model, state, sampler)
        else:
            assert isinstance(model, Mamba2LM)
            step = make_step(model, state, rules, sampler, config.cuda_graph)
            begin[position] = partial(_same, step)
    seconds: dict[int, list[float]] = {position: [] for position in begin}
    tokens = torch.zeros(config.batch_size, dtype=torch.int64)
    for number in range(config.rounds + 1):  # the first warms up
        order = list(begin) if number % 2 else list(reversed(begin))
        for position in order:
            took = _time(begin[position](), tokens, config.tokens)
            if number:
                seconds[position].append(took)
    kind = type(begin[config.positions[0]]()).__name__
    result = _result(config, model, kind, state_bytes, seconds)
    _print(result)
    if config.output is not None:
        try:
            write_text(Path(config.output), to_json(result))
        except OSError as error:
            why = error.strerror or error
            raise ValueError(f"output={config.output}: cannot be written ({why})") from None
    return json.loads(to_json(result))


def _same(step: Step) -> Step:
    return step


def _model(config: GenerationBenchConfig, device: torch.device) -> Mamba2LM | Guest:
    dtype = getattr(torch, config.dtype)
    if config.checkpoint is None:
        torch.manual_seed(config.seed)
        return Mamba2LM(config.model).to(device=device, dtype=dtype).eval()
    if not is_guest(config.checkpoint):
        return load_model(config.checkpoint, device=device, dtype=dtype)
    refused = {
        "dtype": config.dtype,
        "cuda_graph": config.cuda_graph,
        "mitigation.name": config.mitigation.name,
    }
    for (name, value), allowed in zip(refused.items(), (("float32",), (None, False), ("none",)), strict=True):
        if value not in allowed:
            family = guest_config(config.checkpoint).family
            raise ValueError(f"{name}={value}: not of a guest ({family}): leave it out")
    return load_guest(config.checkpoint, device)


def random_tokens(seed: int, rows: int, vocab_size: int) -> Any:
    """A source of `Reader`: rows of any length that never exist whole."""

    def source(begin: int, end: int) -> NDArray[np.int64]:
        blocks = range(begin // BLOCK, -(-end // BLOCK))
        drawn = [np.random.default_rng([seed, b]).integers(0, vocab_size, (rows, BLOCK)) for b in blocks]
        first = begin - blocks[0] * BLOCK
        return np.concatenate(drawn, 1)[:, first : first + end - begin]

    return source


def _time(step: AnyStep, tokens: Tensor, count: int) -> float:
    """Seconds that `count` tokens take, each chosen and read back before the next, as generation does."""
    active, uniforms = torch.ones(len(tokens), dtype=torch.bool), torch.zeros(len(tokens)).double()
    start = time.perf_counter()
    for _ in range(count):
        tokens = torch.tensor(step(tokens, active, uniforms).tolist()).clamp(min=0)
    return time.perf_counter() - start


def _result(
    config: GenerationBenchConfig,
    model: Mamba2LM | Guest,
    kind: str,
    state_bytes: dict[int, int],
    seconds: dict[int, list[float]],
) -> dict[str, Any]:
    made, first = config.batch_size * config.tokens, config.positions[0]
    rows = []
    for position, took in seconds.items():
        ratios = [a / b for a, b in zip(seconds[first], took, strict=True)]
        rows.append(
            {
                "position": position,
                "tokens_per_second": made / statistics.median(took),
                "best_tokens_per_second": made / min(took),
                "speed_against_first": statistics.median(ratios),
                "state_bytes": state_bytes[position],
            }
        )
    growing, grown = model.growth() if isinstance(model, Guest) else ([], 0)
    device = model.lm_head.weight.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "device": name,
        "family": model.config.family if isinstance(model, Guest) else "longstate",
        "step": kind,
        "threads": torch.get_num_threads(),
        "positions": rows,
        "growing_layers": growing,
        "growing_bytes_per_token": grown,
    }


def _print(result: dict[str, Any]) -> None:
    table = Table(title=f"Generation on {result['device']} ({result['family']}, {result['step']})")
    for column in ("tokens before", "tokens/s", "best", "against the first", "state, bytes"):
        table.add_column(column, justify="right")
    for row in result["positions"]:
        table.add_row(
            f"{row['position']:,}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['best_tokens_per_second']:,.0f}",
            f"{row['speed_against_first']:.3f}",
            f"{row['state_bytes']:,}",
        )
    console = Console(highlight=False)
    console.print(table)
    if layers := result["growing_layers"]:
        grown = f"{result['growing_bytes_per_token']:,} bytes a token of each row"
        console.print(
            f"The state grows by {grown}, in layers {', '.join(map(str, layers))}: they are of attention.",
            soft_wrap=True,
        )

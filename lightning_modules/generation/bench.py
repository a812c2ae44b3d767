"""Speed behind prompts of different lengths: rounds in turn, so that what disturbs one disturbs all."""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from conf.generate_schema import DecodingConfig, GenerationBenchConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.checkpoints import load_model
from lightning_modules.evaluation.streaming import Reader
from lightning_modules.generation.sampling import Sampler
from lightning_modules.generation.step import Step, make_step
from lightning_modules.measuring import choose_device, require_writable, show_progress, to_json
from lightning_modules.mitigations import build_mitigation
from lightning_modules.run_dir import write_text
from lightning_modules.state import ModelState

BLOCK = 4096  # random tokens are drawn in blocks, each from a generator of its own


def bench(config: GenerationBenchConfig) -> dict[str, Any]:
    """Measure, print a table; returns what `output` holds."""
    if config.output is not None:
        require_writable("output", config.output)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device, dtype = choose_device(config.device), getattr(torch, config.dtype)
    if config.checkpoint is None:
        torch.manual_seed(config.seed)
        model = Mamba2LM(config.model).to(device=device, dtype=dtype).eval()
    else:
        model = load_model(config.checkpoint, device=device, dtype=dtype)
    rules = build_mitigation(config.mitigation, model.config)
    steps, tokens = {}, torch.zeros(config.batch_size, dtype=torch.int64)
    for position in config.positions:
        with show_progress(f"reading {position:,} tokens", config.batch_size * position) as on_tokens:
            reader = Reader(model, rules, config.segment_length, on_tokens)
            source = random_tokens(config.seed, config.batch_size, model.config.vocab_size)
            state, _ = reader.read(source, None, 0, position, keep=1)
        assert isinstance(state, ModelState)
        sampler = Sampler(DecodingConfig(), model.config.vocab_size)
        steps[position] = make_step(model, state, rules, sampler, config.cuda_graph)
    seconds: dict[int, list[float]] = {position: [] for position in steps}
    for number in range(config.rounds + 1):  # the first warms up
        order = list(steps) if number % 2 else list(reversed(steps))
        for position in order:
            took = _time(steps[position], tokens, config.tokens)
            if number:
                seconds[position].append(took)
    result = _result(config, steps, seconds)
    _print(result)
    if config.output is not None:
        try:
            write_text(Path(config.output), to_json(result))
        except OSError as error:
            raise ValueError(f"output={config.output}: cannot be written ({error.strerror or error})") from None
    return json.loads(to_json(result))


def random_tokens(seed: int, rows: int, vocab_size: int) -> Any:
    """A source of `Reader`: rows of any length that never exist whole."""

    def source(begin: int, end: int) -> NDArray[np.int64]:
        blocks = range(begin // BLOCK, -(-end // BLOCK))
        drawn = [np.random.default_rng([seed, b]).integers(0, vocab_size, (rows, BLOCK)) for b in blocks]
        first = begin - blocks[0] * BLOCK
        return np.concatenate(drawn, 1)[:, first : first + end - begin]

    return source


def _time(step: Step, tokens: torch.Tensor, count: int) -> float:
    """Seconds that `count` tokens take, each chosen and read back before the next, as generation does."""
    active, uniforms = torch.ones(len(tokens), dtype=torch.bool), torch.zeros(len(tokens)).double()
    start = time.perf_counter()
    for _ in range(count):
        tokens = torch.tensor(step(tokens, active, uniforms).tolist()).clamp(min=0)
    return time.perf_counter() - start


def _result(
    config: GenerationBenchConfig, steps: dict[int, Step], seconds: dict[int, list[float]]
) -> dict[str, Any]:
    made, first = config.batch_size * config.tokens, config.positions[0]
    rows = []
    for position, step in steps.items():
        ratios = [a / b for a, b in zip(seconds[first], seconds[position], strict=True)]
        rows.append(
            {
                "position": position,
                "tokens_per_second": made / statistics.median(seconds[position]),
                "best_tokens_per_second": made / min(seconds[position]),
                "speed_against_first": statistics.median(ratios),
                "state_bytes": step.state.nbytes,
            }
        )
    device = next(iter(steps.values())).state.position.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    kind = type(next(iter(steps.values()))).__name__
    return {"device": name, "step": kind, "threads": torch.get_num_threads(), "positions": rows}


def _print(result: dict[str, Any]) -> None:
    table = Table(title=f"Generation on {result['device']} ({result['step']})")
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
    Console().print(table)

"""Predict what a training takes, before it waits in a queue.

    python -m lightning_modules.plan CONFIG.yaml [more.yaml ...] [key=value ...] [measure=true]

Prints parameters, memory by what holds it, time of a step, tokens/s of all devices, and what to change.
With measure=true it runs three steps here and prints what they took beside it.

    python -m lightning_modules.plan conf/train/mamba2-370m-256k.yaml device=h200
    python -m lightning_modules.plan conf/train/demo.yaml measure=true

Ends with 0, with 2 for a config that does not hold or that cannot fit, naming the setting to change.
"""

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from conf.load import die, from_command_line, user_errors
from conf.plan_schema import PlanConfig
from lightning_modules.planning import sizes
from lightning_modules.planning.estimate import (
    GIB,
    USABLE,
    Device,
    Estimate,
    advice,
    estimate,
    fits,
    rows_of,
    tokens_at_once,
    why_eager,
)

if TYPE_CHECKING:
    from lightning_modules.planning.measure import Measured

# Memory, and FLOP/s of large bf16 products: the H200's measured, the others' in proportion to their peaks.
DEVICES = {
    "a100-80": Device("NVIDIA A100 80GB", 79 * GIB, 245e12, on_gpu=True),
    "h100": Device("NVIDIA H100", 79 * GIB, 770e12, on_gpu=True),
    "h200": Device("NVIDIA H200", 139 * GIB, 770e12, on_gpu=True),
}
FP32_SHARE = 0.5  # of bf16 products, with TF32; without it far less


def main(argv: list[str] | None = None) -> int:
    config = from_command_line(PlanConfig, __doc__ or "", argv)
    with user_errors():
        device = find_device(config)
    result = estimate(config, device)
    measured = None
    if config.measure and fits(result, device):
        from lightning_modules.planning.measure import measure

        measured = measure(config, device)
    show(config, device, result, measured)
    if not fits(result, device):
        remedies = advice(config, device) or ["use a smaller model or a larger device"]
        memory = f"{result.peak / GIB:.1f} GiB of {USABLE * device.memory / GIB:.1f}"
        die(f"device={device.name}: needs {memory} that may be used; {remedies[0]}")
    return 0


def find_device(config: PlanConfig) -> Device:
    """The device that is asked for, or is here. Raises ValueError."""
    if config.device in DEVICES:
        device = DEVICES[config.device]
        if config.trainer.precision == "32-true":
            device = replace(device, flops=device.flops * FP32_SHARE)
    else:
        from lightning_modules.planning.measure import device_here

        device = device_here(config, cpu=config.device == "cpu" or config.trainer.accelerator == "cpu")
    if config.memory_gib is not None:
        device = replace(device, memory=config.memory_gib * GIB)
    return device


def show(config: PlanConfig, device: Device, result: Estimate, measured: "Measured | None") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    c, length = config.model, config.data.train_length
    segment = tokens_at_once(config) // rows_of(config)
    size, state = sizes.parameters(c) / 1e6, sizes.state_bytes(c, 4) / 2**20
    where = f"{config.trainer.ranks} x {device.name}, {device.memory / GIB:.1f} GiB each"
    console.print(f"{size:.1f}M parameters; state of a row {state:.2f} MiB; {where}")
    step = f"{result.tokens_per_step:,} tokens, {config.data.batch_size} rows of {length:,}"
    console.print(f"a step: {step}; a device holds {rows_of(config)} at a time, {segment:,} tokens of them")
    table = Table(title="Memory of a device, MiB")
    table.add_column("what")
    table.add_column("predicted", justify="right")
    held = ["parameters", "gradients", "optimizer", "cast_weights", "borders", "activations", "tokens"]
    for name in held + ["graphs"] * result.graphed:
        table.add_row(name.replace("_", " "), f"{getattr(result, name) / 2**20:,.1f}")
    table.add_section()
    table.add_row("peak", f"{result.peak / 2**20:,.1f}")
    if measured is not None:
        table.add_row("measured", f"{measured.peak / 2**20:,.1f}")
        table.add_row("predicted over measured", f"{result.peak / measured.peak:.3f}")
    console.print(table)
    if device.on_gpu:
        off = why_eager(config, device)
        console.print(f"cuda graphs: {'on' if off is None else f'off ({off})'}", soft_wrap=True)
        launched = "launched as graphs" if result.graphed else f"{result.host_seconds:.3g} s to launch it"
        console.print(f"a step takes the device {result.device_seconds:.3g} s; {launched}")
    console.print(f"step {result.seconds:.3g} s, {result.tokens_per_second:,.0f} tokens/s predicted")
    if measured is not None:
        console.print(f"step {measured.seconds:.3g} s, {measured.tokens_per_second:,.0f} tokens/s measured")
    for line in advice(config, device):
        console.print(f"suggestion: {line}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())

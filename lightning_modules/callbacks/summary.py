"""What is about to be trained, before the first step."""

import re
import sys
from collections import Counter

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table

from conf.initial_state import InitialStateConfig
from conf.schema import ModelConfig
from lightning_modules.dtypes import require_fp32
from lightning_modules.language_model import LanguageModel
from lightning_modules.mitigations import AnyMitigation
from lightning_modules.optim import full_shape, parameter_groups
from lightning_modules.state import ModelState


class PrintSummary(pl.Callback):
    """Prints parameters, state size, which parameters weight decay pulls on, what the recurrence is
    computed in, and on a GPU whether micro-batches are CUDA graphs. Raises RunError on every rank where the
    recurrence is not fp32."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        dtypes = require_fp32(pl_module.recurrence_dtypes())
        if trainer.is_global_zero:
            table = summarize(pl_module)
            table.add_row("dtypes", dtypes)
            if trainer.strategy.root_device.type == "cuda":
                why = pl_module.eager_because
                table.add_row("cuda graphs", "on" if why is None else f"off ({why})")
            Console(width=None if sys.stdout.isatty() else 160).print(table)


def summarize(module: LanguageModel) -> Table:
    """The summary as a rich table of two columns."""
    config = module.config
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    parameters = sum(full_shape(parameter).numel() for parameter in module.model.parameters())
    conv, ssm = state_elements(config.model, module.mitigation)
    table.add_row("parameters", f"{parameters:,}")
    table.add_row("state", f"{conv + ssm:,} elements a sequence ({ssm:,} SSM, {conv:,} convolution)")
    for label, group in zip(("decayed", "not decayed"), parameter_groups(module.model, 1.0), strict=True):
        table.add_row(label, ", ".join(_compact(group["param_names"])))
    table.add_row("mitigation", module.mitigation.key)
    table.add_row("initial state", describe_initial_state(config.initial_state))
    return table


def describe_initial_state(config: InitialStateConfig) -> str:
    """The name and what differs from the defaults, such as `passed(reset_probability=0.1)`."""
    default = vars(InitialStateConfig())
    changed = [f"{k}={v}" for k, v in vars(config).items() if k != "name" and v != default[k]]
    return f"{config.name}({', '.join(changed)})" if changed else config.name


def state_elements(config: ModelConfig, mitigation: AnyMitigation) -> tuple[int, int]:
    """Numbers that one sequence's recurrent state holds: convolution tails, SSM states or windows."""
    state = ModelState.zeros(config, 1, "meta", torch.float32, mitigation)
    total = sum(t.numel() for layer in state.layers for t in layer.tensors())
    conv = sum(layer.conv.numel() for layer in state.layers)
    return conv, total - conv


def _compact(names: list[str]) -> list[str]:
    """`backbone.layers.0.mixer.D`, `backbone.layers.1.mixer.D` -> `layers.*.mixer.D (2)`."""
    counts = Counter(re.sub(r"\.\d+\.", ".*.", name.removeprefix("backbone.")) for name in names)
    return [f"{name} ({count})" if count > 1 else name for name, count in counts.items()]

"""The device that is here, and three steps of a training on it: memory beyond the process's own, and time."""

import gc
import os
import time
from typing import NamedTuple

import torch
from torch import Tensor

from conf.schema import TrainConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.cpu import settle_memory
from lightning_modules.graphs import GraphedLoss
from lightning_modules.memory import peak_memory_mib
from lightning_modules.optim import build_optimizer
from lightning_modules.planning.estimate import Device, piece_of, rows_of, tokens_at_once, why_eager
from lightning_modules.segments import segmented_losses
from lightning_modules.state import ModelState

STEPS = 3


class Measured(NamedTuple):
    """peak in bytes; seconds of an optimizer step; tokens_per_second of all devices, if each is as fast."""

    peak: float
    seconds: float
    tokens_per_second: float


def device_here(config: TrainConfig, cpu: bool) -> Device:
    """Its memory, and the speed of a large product in the run's precision, measured within a second."""
    on_gpu = torch.cuda.is_available() and not cpu
    place = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if config.trainer.precision == "bf16-mixed" else torch.float32
    size = 8192 if on_gpu else 1024
    own = torch.Generator(place).manual_seed(0)  # a run draws from the default one
    a = torch.randn(size, size, device=place, dtype=dtype, generator=own)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    if on_gpu:
        del a
        torch.cuda.reset_peak_memory_stats()  # a run's own peak is yet to come
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, properties.total_memory, 2 * size**3 / best, on_gpu=True)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device("this CPU", memory, 2 * size**3 / best, on_gpu=False)


def measure(config: TrainConfig, device: Device) -> Measured:
    """Three optimizer steps on random tokens, one micro-batch each, on `device`, which is here. The peak is
    what they add to the process (on a GPU: what PyTorch allocates, with graphs: reserves); seconds are those
    of a whole step with all its micro-batches."""
    on_gpu, graphed = device.on_gpu, why_eager(config, device) is None
    place = torch.device("cuda" if on_gpu else "cpu")
    settle_memory(tokens_at_once(config), config.trainer.segment_length is not None)
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    _step(config, place, 64, graphed)  # what libraries load when they are first called is not the model's
    gc.collect()
    before = 0.0 if on_gpu else _resident()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = _step(config, place, piece_of(config), graphed)
    peak = peak_memory_mib(place, graphed=graphed) * 2**20 - before
    seconds *= config.trainer.accumulate
    return Measured(peak, seconds, config.data.batch_size * config.data.train_length / seconds)


def _step(config: TrainConfig, place: torch.device, length: int, graphed: bool) -> float:
    """Seconds of the fastest of three steps of one micro-batch."""
    torch.manual_seed(config.seed)
    model = Mamba2LM(config.model).to(place)
    optimizer = build_optimizer(model, config.optim)
    bf16 = config.trainer.precision == "bf16-mixed"

    def loss_of(batch: dict[str, Tensor], state: ModelState | None) -> tuple[Tensor, ModelState]:
        length = config.trainer.segment_length
        losses, final = segmented_losses(model, batch["ids"], batch["targets"], state, length=length)
        return losses.mean(), final

    launch = GraphedLoss(loss_of, list(model.parameters()), ("ids", "targets")) if graphed else loss_of
    times = []
    for step in range(STEPS):
        if graphed and step == 1:
            torch.cuda.empty_cache()  # of the passes before the capture
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        ids = torch.randint(config.model.vocab_size, (rows_of(config), length + 1), device=place)
        with torch.autocast(place.type, torch.bfloat16, enabled=bf16):
            loss, _ = launch({"ids": ids[:, :-1], "targets": ids[:, 1:]}, None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip or 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if place.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def _resident() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

"""What the probe costs: a forward pass with and without it, in turn.

    python -m lightning_modules.diagnosis.overhead checkpoint=PATH [key=value ...]

Prints tokens/s of both and how much longer the probed pass takes: by the median over pairs of rounds, and by
the fastest rounds, which other work on the machine disturbs least. On a CPU seconds are those of its cores,
threads=1 makes them one core's.
"""

import statistics
import time
from contextlib import nullcontext

from conf.diagnosis import OverheadConfig
from conf.load import from_command_line, user_errors


def main(argv: list[str] | None = None) -> None:
    config = from_command_line(OverheadConfig, __doc__ or "", argv)
    with user_errors():
        plain, probed = measure(config)
    tokens = config.prompts * config.length
    for name, seconds in (("plain", plain), ("probed", probed)):
        median, best = tokens / statistics.median(seconds), tokens / min(seconds)
        print(f"{name:<7} {median:,.0f} tokens/s, best {best:,.0f}")
    ratio = statistics.median(b / a for a, b in zip(plain, probed, strict=True)) - 1
    best_ratio = min(probed) / min(plain) - 1
    print(f"probe at a stride of {config.stride:,}: {ratio:+.1%}, best rounds {best_ratio:+.1%}")


def measure(config: OverheadConfig) -> tuple[list[float], list[float]]:
    """Seconds of every round without and with the probe."""
    import torch

    from kernels.ssd import Mitigation
    from lightning_modules.checkpoints import load_model
    from lightning_modules.diagnosis.probe import StateProbe
    from lightning_modules.diagnosis.prompts import random_source
    from lightning_modules.evaluation.streaming import Reader
    from lightning_modules.measuring import choose_device

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_model(config.checkpoint, device=device, dtype=dtype)
    source = random_source(model.config.vocab_size, config.prompts, seed=0)
    reader = Reader(model, Mitigation(), config.segment)

    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def read(stride: int | None) -> float:
        probe, start = StateProbe(model), clock()
        with nullcontext() if stride is None else probe.attached():
            probe.stride = stride or 1
            for _ in reader.losses_from(source, None, 0, config.length, stride):
                if stride is not None:
                    probe.take()
        return clock() - start

    rounds = [(read(None), read(config.stride)) for _ in range(config.rounds + 1)][1:]  # the first warms up
    plain, probed = zip(*rounds, strict=True)
    return list(plain), list(probed)


if __name__ == "__main__":
    main()

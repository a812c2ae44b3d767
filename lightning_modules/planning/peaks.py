"""Peak rates of dense matrix products, as makers state them, and the share of them that training reaches."""

import torch

from conf.schema import TrainConfig
from lightning_modules.planning import sizes

# FLOP/s in bf16, TF32, and fp32 without tensor cores, by what the device's name holds; the first that fits.
PEAKS = {
    "H200": (989e12, 494e12, 67e12),
    "H100 PCIe": (756e12, 378e12, 51e12),
    "H100 NVL": (835e12, 417e12, 60e12),
    "H100": (989e12, 494e12, 67e12),
    "A100": (312e12, 156e12, 19.5e12),
}


def peak_flops(config: TrainConfig, device: torch.device) -> float | None:
    """Of one device, in the dtype of the run's products; None for a CPU or a device not in the table."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), config.trainer.precision)


def peak_of(name: str, precision: str) -> float | None:
    """name: as CUDA tells it, such as `NVIDIA H100 80GB HBM3`."""
    rates = next((rates for part, rates in PEAKS.items() if part in name), None)
    if rates is None:
        return None
    bf16, tf32, fp32 = rates
    if precision == "bf16-mixed":
        return bf16
    return fp32 if torch.get_float32_matmul_precision() == "highest" else tf32


def model_flops_utilisation(config: TrainConfig, tokens_per_second: float, peak: float) -> float:
    """The model's own FLOPs, forward and backward, nothing recomputed, over what all devices could do."""
    flops = 3 * sizes.flops_per_token(config.model) * tokens_per_second
    return flops / (config.trainer.ranks * peak)

"""The warmup-stable-decay schedule of the learning rate, and how far two lengths of it agree."""

from conf.schema import OptimConfig


def lr_factor(step: int, config: OptimConfig, max_steps: int) -> float:
    """lr / peak lr of optimizer step `step` (from 0): linear warmup, 1, linear decay to min_lr_ratio.

    Step warmup_steps - 1 is the first at the peak; step max_steps - 1 is at min_lr_ratio.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay_steps = round(config.decay_fraction * max_steps)
    steps_left = max(0, max_steps - step - 1)
    if steps_left >= decay_steps:
        return warmup
    return min(warmup, config.min_lr_ratio + (1.0 - config.min_lr_ratio) * steps_left / decay_steps)


def stable_steps(config: OptimConfig, max_steps: int) -> int:
    """After how many steps a run still stands where a longer one would: its checkpoint there, which holds the
    rate of the step to come, says nothing of max_steps."""
    decay_steps = round(config.decay_fraction * max_steps)
    return max_steps if decay_steps == 0 else max(0, max_steps - 1 - decay_steps)

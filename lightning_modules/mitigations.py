"""From the config's mitigation to the scan's."""

from conf.schema import MitigationConfig
from kernels.ssd import Mitigation


def build_mitigation(config: MitigationConfig) -> Mitigation:
    """The mitigation as the scan takes it: one factor for all heads and layers."""
    return Mitigation(
        name=config.name,
        alpha_scale=config.alpha_scale,
        insert_scale=config.insert_scale,
        delta_scale=config.delta_scale,
        decay_scale=config.decay_scale,
    )

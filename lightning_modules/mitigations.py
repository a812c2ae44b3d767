"""From the config's mitigation to the scan's."""

from dataclasses import asdict

from conf.schema import MitigationConfig
from kernels.ssd import Mitigation


def build_mitigation(config: MitigationConfig) -> Mitigation:
    """The mitigation as the scan takes it: the same settings for all heads and layers."""
    return Mitigation(**asdict(config))

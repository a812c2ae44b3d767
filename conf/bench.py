"""Which mitigations a comparison measures, and at which settings: mitigation.name=all."""

import itertools
from collections.abc import Mapping
from typing import Any

from conf.fields import require
from conf.load import from_dict
from conf.mitigation import MITIGATIONS, MitigationConfig

WHOLE = ("layers", "heads")  # settings whose value is a list


def default_settings(train_length: int) -> dict[str, dict[str, Any]]:
    """A sane setting of each mitigation for a model trained at `train_length` tokens.

    Memories of about two training lengths for forget_more, of one for sliding_window, of less for hard_reset;
    norms and thresholds as calibrated; dt halved, a published constant scaling; A half as fast again.
    """
    return {
        "forget_more": {"alpha_scale": 1 - 1 / (2 * train_length)},
        "delta_scale": {"delta_scale": 0.5},
        "decay_scale": {"decay_scale": 1.5},
        "state_norm": {"calibration": "auto", "every": max(1, train_length // 4)},
        "sliding_window": {"window": train_length},
        # A divisor of the usual prompt lengths would put a reset just where the recent needles begin.
        "hard_reset": {"every": max(1, 3 * train_length // 4)},
        "token_filter": {"calibration": "auto"},
    }


def bench_mitigations(chosen: Mapping[str, Any], train_length: int) -> list[MitigationConfig]:
    """Every mitigation of a comparison: `chosen` settings in place of the defaults, none for a null.

    A setting may be a list of values: every combination is measured. Raises ValueError, naming the setting.
    """
    for name, settings in chosen.items():
        remedy = f"is no mitigation; choose from {', '.join(MITIGATIONS)}"
        require(name in MITIGATIONS, f"bench.{name}", settings, remedy)
        mapping = settings is None or isinstance(settings, Mapping)
        require(
            mapping, f"bench.{name}", settings, "give settings, e.g. {window: [64, 256]}, or null for none"
        )
    found = []
    for name, settings in (default_settings(train_length) | dict(chosen)).items():
        for point in _grid(settings) if settings is not None else []:
            try:
                found.append(from_dict(MitigationConfig, {"name": name, **point}))
            except ValueError as error:
                raise ValueError(f"bench.{name}: {error}") from None
    return found


def _grid(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the values, the last setting changing fastest."""
    values = [v if isinstance(v, list) and k not in WHOLE else [v] for k, v in settings.items()]
    return [dict(zip(settings, point, strict=True)) for point in itertools.product(*values)]

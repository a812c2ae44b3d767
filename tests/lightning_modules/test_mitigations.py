"""The config's mitigations are the scan's."""

from typing import Any, get_args, get_type_hints

import pytest

from conf.load import to_dict
from conf.schema import MITIGATION_OWNERS, MitigationConfig, changed_settings
from kernels.ssd.mitigation import SETTINGS, Mitigation
from lightning_modules.evaluation.report import describe_mitigation
from lightning_modules.mitigations import build_mitigation

CHOSEN: list[dict[str, Any]] = [
    {"name": "forget_more", "alpha_scale": 0.99},
    {"name": "delta_scale", "delta_scale": 1.5},
    {"name": "decay_scale", "decay_scale": 0.5},
    {"name": "state_norm", "max_norm": 2.0, "every": 1},
    {"name": "sliding_window", "window": 1},
    {"name": "hard_reset", "every": 64},
]


def test_names_and_settings_agree_with_the_scans() -> None:
    owners: dict[str, tuple[str, ...]] = {}
    for name, settings in SETTINGS.items():
        for setting in settings:
            owners[setting] = (*owners.get(setting, ()), name)
    assert owners == MITIGATION_OWNERS
    assert set(get_args(get_type_hints(MitigationConfig)["name"])) == {"none", *SETTINGS}


@pytest.mark.parametrize("chosen", CHOSEN, ids=[c["name"] for c in CHOSEN])
def test_settings_reach_the_scan_and_the_report(chosen: dict[str, Any]) -> None:
    config = MitigationConfig(**chosen)
    assert build_mitigation(config) == Mitigation(**chosen)
    settings = {name: value for name, value in chosen.items() if name != "name"}
    assert changed_settings(to_dict(config)) == settings
    described = ", ".join(f"{name} {value:g}" for name, value in settings.items())
    assert describe_mitigation(to_dict(config)) == f"{chosen['name']} ({described})"


def test_none_is_none() -> None:
    assert build_mitigation(MitigationConfig()) == Mitigation()
    assert describe_mitigation(to_dict(MitigationConfig())) == ""

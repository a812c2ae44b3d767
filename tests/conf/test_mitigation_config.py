"""Settings of mitigations are refused by name, without torch and before any work."""

import pytest

from conf.load import parse
from conf.measure_schema import EvaluateConfig
from conf.mitigation import MitigationConfig
from conf.schema import TrainConfig

MISTAKES = {
    "{name: token_filter}": "mitigation.threshold=None: token_filter needs it, or mitigation.calibration",
    "{name: token_filter, threshold: -1}": "mitigation.threshold=-1.0: must be finite and not negative",
    "{name: token_filter, threshold: .inf}": "mitigation.threshold=inf: must be finite",
    "{name: sliding_window, window: 0}": "mitigation.window=0: must be at least 1",
    "{name: state_norm, max_norm: 1, every: 0}": "mitigation.every=0: must be at least 1",
    "{name: forget_more, alpha_scale: 0}": "mitigation.alpha_scale=0.0: must lie in (0, 1]",
    "{name: forget_more, insert_scale: 1.01}": "mitigation.insert_scale=1.01: must lie in (0, 1]",
    "{name: delta_scale, delta_scale: 0}": "mitigation.delta_scale=0.0: must be positive and finite",
    "{name: decay_scale, decay_scale: .nan}": "mitigation.decay_scale=nan: must be positive and finite",
    "{name: hard_reset, every: 3, heads: [L0H8]}": (
        "mitigation.heads=L0H8: the layers are 0 to 1, the heads 0 to 7"
    ),
    "{name: hard_reset, every: 3, heads: [L2H0]}": "mitigation.heads=L2H0: the layers are 0 to 1",
    "{name: hard_reset, every: 3, heads: [1:30]}": "mitigation.heads=90: write L2H17 for layer 2, head 17",
    "{name: hard_reset, every: 3, layers: [0, 2]}": "mitigation.layers=[2]: the layers are 0 to 1",
    "{name: hard_reset, every: 3, layers: [-1]}": "mitigation.layers=[-1]: count from 0",
    "{heads: [L0H0]}": "mitigation.heads=['L0H0']: choose a mitigation: mitigation.name",
    "{name: hard_reset, every: 3, length: 9}": "mitigation.length=9: belongs to token_filter",
    "{name: token_filter, threshold: 0.1, length: 9}": "mitigation.length=9: needs mitigation.calibration",
    "{name: hard_reset, every: 3, calibration: x.json}": (
        "mitigation.calibration=x.json: belongs to state_norm, token_filter, delta_scale, decay_scale"
    ),
    "{name: state_norm, every: 3, max_norm: 1, calibration: x.json}": (
        "mitigation.max_norm=1.0: the calibration gives it; leave it out"
    ),
    "{name: decay_scale, decay_scale: 2, calibration: x.json}": "mitigation.decay_scale=2.0: the calibration",
    "{name: state_norm, every: 3, max_norm: 1, calibration_scale: 2}": (
        "mitigation.calibration_scale=2.0: needs mitigation.calibration"
    ),
    "{name: state_norm, every: 3, calibration: x.json, calibration_scale: 0}": (
        "mitigation.calibration_scale=0.0: must be positive and finite"
    ),
    "{name: state_norm, calibration: x.json}": "mitigation.every=None: state_norm needs it",
    "{name: state_norm, every: 3, calibration: x.json}": (
        "mitigation.calibration=x.json: belongs to a checkpoint: start from that one, init_from=PATH"
    ),
    "{name: state_norm, every: 3, calibration: auto}": "mitigation.calibration=auto: give the file itself",
    "{name: all}": "mitigation.name=all: only evaluate compares all; choose one",
}


@pytest.mark.parametrize(("settings", "message"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_is_named_in_one_line(settings: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        parse(TrainConfig, [f"mitigation={settings}"])
    assert message in str(caught.value)


def test_what_is_legitimate_passes() -> None:
    parse(TrainConfig, ["mitigation={name: decay_scale, decay_scale: 3}"])
    parse(TrainConfig, ["init_from=x", "mitigation={name: state_norm, every: 3, calibration: x.json}"])
    parse(EvaluateConfig, ["checkpoint=x", "mitigation.name=all"])
    parse(EvaluateConfig, ["checkpoint=x", "mitigation={name: token_filter, calibration: auto, length: 9}"])


def test_chosen_heads_are_those_of_the_layers_and_the_heads() -> None:
    config = MitigationConfig(name="hard_reset", every=3, layers=[1], heads=["L0H2", "L1H1", "L0H0"])
    assert config.chosen_heads(3, 4) == {1: (0, 1, 2, 3), 0: (0, 2)}
    assert MitigationConfig(name="hard_reset", every=3).chosen_heads(3, 4) is None

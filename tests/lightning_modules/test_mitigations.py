"""The config's mitigations are the scan's."""

from typing import Any, get_args, get_type_hints

import pytest
import torch

from conf.load import to_dict
from conf.mitigation import MITIGATION_OWNERS, MITIGATIONS, MitigationConfig, changed_settings
from conf.schema import ModelConfig
from kernels.ssd.mitigation import SETTINGS, Mitigation
from lightning_modules.backbone import Mamba2LM
from lightning_modules.evaluation.report import describe_mitigation
from lightning_modules.mitigations import LayerMitigations, build_mitigation, for_layers

CHOSEN: list[dict[str, Any]] = [
    {"name": "forget_more", "alpha_scale": 0.99},
    {"name": "delta_scale", "delta_scale": 1.5},
    {"name": "decay_scale", "decay_scale": 0.5},
    {"name": "state_norm", "max_norm": 2.0, "every": 1},
    {"name": "sliding_window", "window": 1},
    {"name": "hard_reset", "every": 64},
    {"name": "token_filter", "threshold": 0.01},
]
MODEL = ModelConfig(d_model=32, n_layers=3, headdim=16, d_state=8, chunk_size=16)  # 4 heads


def test_names_and_settings_agree_with_the_scans() -> None:
    owners: dict[str, tuple[str, ...]] = {}
    for name, settings in SETTINGS.items():
        for setting in settings:
            owners[setting] = (*owners.get(setting, ()), name)
    assert owners == {name: of for name, of in MITIGATION_OWNERS.items() if name != "length"}
    assert set(get_args(get_type_hints(MitigationConfig)["name"])) == {"none", "all", *SETTINGS}
    assert set(MITIGATIONS) == set(SETTINGS)


@pytest.mark.parametrize("chosen", CHOSEN, ids=[c["name"] for c in CHOSEN])
def test_settings_reach_the_scan_and_the_report(chosen: dict[str, Any]) -> None:
    config = MitigationConfig(**chosen)
    assert build_mitigation(config, MODEL) == for_layers(Mitigation(**chosen), 3)
    settings = {name: value for name, value in chosen.items() if name != "name"}
    assert changed_settings(to_dict(config)) == settings
    described = ", ".join(f"{name} {value:g}" for name, value in settings.items())
    assert describe_mitigation(to_dict(config)) == f"{chosen['name']} ({described})"


def test_none_is_none() -> None:
    assert build_mitigation(MitigationConfig(), MODEL) == for_layers(None, 3)
    assert describe_mitigation(to_dict(MitigationConfig())) == ""


def model() -> Mamba2LM:
    torch.manual_seed(0)
    return Mamba2LM(MODEL).eval()


def test_layers_and_heads_reach_the_scan_of_their_layer() -> None:
    config = MitigationConfig(name="hard_reset", every=9, layers=[2], heads=["L0H3", "L0H1"])
    rules = build_mitigation(config, MODEL).layers
    assert rules == (
        Mitigation("hard_reset", every=9, heads=(1, 3)),
        Mitigation(),
        Mitigation("hard_reset", every=9, heads=(0, 1, 2, 3)),
    )
    assert describe_mitigation(to_dict(config)) == "hard_reset (every 9, layers 2, heads L0H3 L0H1)"


@pytest.mark.parametrize("chosen", CHOSEN, ids=[c["name"] for c in CHOSEN])
def test_a_model_reads_alike_whole_in_pieces_and_by_single_tokens(
    chosen: dict[str, Any], check_close: Any
) -> None:
    """Under a rule of some heads of some layers; the state names the rule and refuses every other."""
    rules = build_mitigation(MitigationConfig(**chosen, layers=[1], heads=["L2H0", "L2H2"]), MODEL)
    other = build_mitigation(MitigationConfig(**chosen, layers=[1], heads=["L2H0", "L2H3"]), MODEL)
    lm, ids = model(), torch.randint(0, 256, (2, 40))
    with torch.no_grad():
        whole = lm(ids, mitigation=rules).logits
        state, logits = None, []
        for start, stop in ((0, 1), (1, 2), (2, 25), (25, 26), (26, 40)):
            out = lm(ids[:, start:stop], state, mitigation=rules)
            logits.append(out.logits)
            state = out.state
        check_close(torch.cat(logits, 1), whole, 1e-5, "logits")
        for wrong in (other, None, Mitigation(**chosen)):
            with pytest.raises(ValueError, match="state belongs to mitigation"):
                lm(ids, state, mitigation=wrong)


def test_values_per_head_are_part_of_what_a_state_names() -> None:
    norms = [torch.full((4,), 2.0), torch.tensor([2.0, 2.0, 2.0, 2.5])]
    keys = {LayerMitigations((Mitigation("state_norm", max_norm=n, every=4),) * 3).key for n in norms}
    mixed = LayerMitigations(tuple(Mitigation("state_norm", max_norm=norms[i], every=4) for i in (0, 1, 0)))
    assert len(keys | {mixed.key}) == 3


def test_a_mitigation_of_one_rule_shares_its_states_with_the_rule() -> None:
    lm, ids = model(), torch.randint(0, 256, (1, 8))
    rule = Mitigation("forget_more", 0.9)
    with torch.no_grad():
        state = lm(ids, mitigation=rule).state
        lm(ids, state, mitigation=for_layers(rule, 3))
    with pytest.raises(ValueError, match="mitigation: has 2 layers, the model 3"):
        lm(ids, mitigation=for_layers(rule, 2))


def test_rules_made_while_evaluating_serve_training() -> None:
    lm, ids = model(), torch.randint(0, 256, (1, 8))
    rules = build_mitigation(MitigationConfig(name="decay_scale", decay_scale=1.5, heads=["L0H1"]), MODEL)
    with torch.inference_mode():
        lm(ids, mitigation=rules)
    lm(ids, mitigation=rules).logits.sum().backward()
    assert all(p.grad is not None for p in lm.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": ["L1H4"]}, r"mitigation.heads=L1H4: the layers are 0 to 2, the heads 0 to 3"),
        ({"heads": ["L0H0", "L3H0"]}, r"mitigation.heads=L3H0: the layers are 0 to 2"),
        ({"layers": [1, 5]}, r"mitigation.layers=\[5\]: the layers are 0 to 2"),
    ],
)
def test_layers_and_heads_that_the_model_lacks_are_named(settings: dict[str, Any], message: str) -> None:
    config = MitigationConfig(name="hard_reset", every=3, **settings)
    with pytest.raises(ValueError, match=message):
        build_mitigation(config, MODEL)

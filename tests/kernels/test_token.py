"""One token under any mitigation: the oracle, token by token, and rows that do not take part left alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.ssd import Mitigation, State, Window, map_state, ssd_scan, ssd_token, zero_state

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENWISE = ("x", "dt", "B", "C")
BATCH, HEADS, HEADDIM, STATE, GROUPS = 3, 4, 5, 6, 2
LENGTH = 9

MITIGATIONS = {
    "none": Mitigation(),
    "forget_more": Mitigation("forget_more", 0.9, 0.7),
    "token_filter": Mitigation("token_filter", threshold=0.4),
    "hard_reset": Mitigation("hard_reset", every=3),
    "hard_reset of some heads": Mitigation("hard_reset", every=3, heads=(0, 3)),
    "hard_reset at every token": Mitigation("hard_reset", every=1),
    "state_norm": Mitigation("state_norm", max_norm=0.5, every=2),
    "state_norm at every token": Mitigation("state_norm", max_norm=0.5, every=1),
    "state_norm of some heads": Mitigation("state_norm", max_norm=0.5, every=2, heads=(1, 2)),
    "state_norm per head": Mitigation(
        "state_norm", max_norm=torch.tensor([0.1, 0.5, torch.inf, 1.0]), every=3
    ),
    "sliding_window": Mitigation("sliding_window", window=4),
    "sliding_window of one token": Mitigation("sliding_window", window=1),
    "sliding_window of some heads": Mitigation("sliding_window", window=4, heads=(1,)),
}


def arguments() -> dict[str, Tensor]:
    values = {
        "x": torch.randn(BATCH, LENGTH, HEADS, HEADDIM),
        "dt": torch.rand(BATCH, LENGTH, HEADS),
        "A": -torch.rand(HEADS) - 0.1,
        "B": torch.randn(BATCH, LENGTH, GROUPS, STATE),
        "C": torch.randn(BATCH, LENGTH, GROUPS, STATE),
        "D": torch.randn(HEADS),
        "position": torch.tensor([0, 5, 11]),
    }
    return {name: value.to(DEVICE) for name, value in values.items()}


def warm_state(mitigation: Mitigation) -> State:
    """The state after some tokens: nowhere zero where it need not be."""
    zero = zero_state(mitigation, BATCH, HEADS, HEADDIM, GROUPS, STATE, dtype=torch.float32, device=DEVICE)
    return ssd_scan(**arguments(), initial_state=zero, mitigation=mitigation)[1]


def parts(state: State) -> tuple[Tensor, ...]:
    return tuple(state) if isinstance(state, Window) else (state,)


@pytest.mark.parametrize("name", MITIGATIONS)
def test_tokens_equal_the_scan(name: str, check_close: Any) -> None:
    mitigation, given = MITIGATIONS[name], arguments()
    state = warm_state(mitigation)
    expected, final = ssd_scan(
        **given, initial_state=map_state(torch.clone, state), mitigation=mitigation, backend="naive"
    )
    position, outputs = given.pop("position"), []
    for t in range(LENGTH):
        token = {key: value[:, t] if key in TOKENWISE else value for key, value in given.items()}
        outputs.append(ssd_token(state, **token, mitigation=mitigation, position=position + t))
    check_close(torch.stack(outputs, 1), expected, 1e-5, "y")
    for actual, wanted in zip(parts(state), parts(final), strict=True):
        check_close(actual, wanted.float(), 1e-5, "state")


@pytest.mark.parametrize("name", MITIGATIONS)
def test_rows_that_are_not_active_stay_bit_for_bit(name: str, check_close: Any) -> None:
    mitigation, given = MITIGATIONS[name], arguments()
    state = warm_state(mitigation)
    before, alone = map_state(torch.clone, state), map_state(torch.clone, state)
    active = torch.tensor([True, False, True], device=DEVICE)
    position = given.pop("position")
    for t in range(LENGTH):
        token = {key: value[:, t] if key in TOKENWISE else value for key, value in given.items()}
        y = ssd_token(state, **token, mitigation=mitigation, position=position + t, active=active)
        expected = ssd_token(alone, **token, mitigation=mitigation, position=position + t)
        check_close(y[active], expected[active], 1e-6, "y")
    for now, once, other in zip(parts(state), parts(before), parts(alone), strict=True):
        assert torch.equal(now[1], once[1])
        check_close(now[active], other[active], 1e-6, "state")

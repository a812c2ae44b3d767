"""Unsolved, collapse and forgetting are never taken for one another."""

import pytest

from lightning_modules.evaluation.conclusion import conclude, metrics

LENGTHS = [256, 512, 1024, 4096, 16384]


def rows(exact: list[float]) -> list[dict]:
    return [{"length": length, "exact": value} for length, value in zip(LENGTHS, exact, strict=False)]


@pytest.mark.parametrize(
    ("recent", "recall", "solved", "collapse", "forgetting"),
    [
        pytest.param([1, 1, 1, 1, 1], [1, 1, 0.9, 0.8], True, None, None, id="holds"),
        pytest.param([1, 0.9, 0.6, 0.5, 0.3], [0.95, 0.9, 0.6, 0.3], True, 4096, None, id="collapse"),
        pytest.param([1, 1, 0.9, 0.8, 0.7], [0.95, 0.5, 0.3, 0.1], True, None, 512, id="forgetting"),
        pytest.param([1, 0.9, 0.8, 0.4, 0.2], [0.95, 0.7, 0.4, 0.1], True, 4096, 1024, id="both"),
        pytest.param([0.7, 0.4, 0.2, 0.1, 0.0], [0.6, 0.2, 0.1, 0.0], False, None, None, id="unsolved"),
        pytest.param([1, 0.9, 0.8, 0.4, 0.2], [0.6, 0.2, 0.1, 0.0], False, None, None, id="near only"),
        pytest.param([1, 0.9, 0.8, 0.4, 0.2], [], True, 4096, None, id="no recall"),
    ],
)
def test_judgement(
    recent: list[float], recall: list[float], solved: bool, collapse: int | None, forgetting: int | None
) -> None:
    passkey = {"recent": rows(recent), "recall_by_length": rows(recall)}
    found = conclude(256, passkey, None)
    assert (found["solved"], found["collapse"], found["forgetting"]) == (
        solved,
        collapse is not None,
        forgetting is not None,
    )
    assert (found["collapse_length"], found["forgetting_length"]) == (collapse, forgetting)
    words = {"Unsolved": not solved, "Collapse:": found["collapse"], "Forgetting:": found["forgetting"]}
    assert {word: word in found["summary"] for word in words} == words
    assert found["loss_rises"] is None


@pytest.mark.parametrize(
    ("loss", "rises"),
    [
        pytest.param([3.0, 0.1, 0.1, 0.1, 2.9, 0.1, 0.1, 0.1], False, id="one hard passage"),
        pytest.param([0.3, 0.1, 0.1, 0.1, 0.4, 0.5, 0.6, 0.7], True, id="rise"),
        pytest.param([0.3, 0.1, 0.1, 0.1, 0.1, 0.1, None, 0.1], True, id="not finite"),
        pytest.param([0.3, 0.1, 0.1, 0.1], None, id="nothing beyond"),
    ],
)
def test_loss_rises_above_its_maximum_within(loss: list[float | None], rises: bool | None) -> None:
    position = [64 * i + 32.5 for i in range(len(loss))]
    found = conclude(256, None, {"position": position, "loss": loss})
    assert found["loss_rises"] is rises
    assert found["solved"] is None
    assert found["loss_in_length"] == pytest.approx(sum(loss[:4]) / 4)  # type: ignore[arg-type]
    measured = metrics(256, None, found)
    assert ("loss/max_beyond" in measured) == (rises is not None and None not in loss)


def test_metrics_by_name() -> None:
    passkey = {"recent": rows([1, 0.9, 0.8, 0.6, 0.2]), "recall_by_length": rows([0.95, 0.7])}
    assert metrics(256, passkey, conclude(256, passkey, None)) == {
        "passkey/recent_exact_at_256": 1,
        "passkey/recent_exact_at_512": 0.9,
        "passkey/recent_exact_at_1024": 0.8,
        "passkey/recent_exact_at_4096": 0.6,
        "passkey/recent_exact_at_16384": 0.2,
        "passkey/recall_exact_at_256": 0.95,
        "passkey/recall_exact_at_512": 0.7,
        "passkey/recent_exact_in_length": 1,
        "passkey/recall_exact_in_length": 0.95,
        "passkey/recent_exact_beyond": pytest.approx(0.4),  # 16x and 64x
    }

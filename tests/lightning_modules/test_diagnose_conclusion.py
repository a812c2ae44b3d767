"""Verdicts keep unsolved, collapse and forgetting apart; prompts are one text however they are cut."""

from typing import Any

import numpy as np
import pytest

from conf.diagnosis import ThresholdsConfig
from conf.load import parse
from conf.measure_schema import DiagnoseConfig
from conf.schema import DataConfig
from data.tokenizers import ByteTokenizer
from lightning_modules.diagnosis.conclusion import judge_loss, judge_needles
from lightning_modules.diagnosis.heads import collapsed_heads, head_rows, over_retaining_heads
from lightning_modules.diagnosis.needles import doubled_lengths, refined
from lightning_modules.diagnosis.probe import MEASURES
from lightning_modules.diagnosis.prompts import prompt_source
from lightning_modules.diagnosis.reading import Measures

DEFAULT = ThresholdsConfig()


def rows(exact: dict[int, float], loss: dict[int, float | None] | None = None) -> list[dict[str, Any]]:
    losses = loss or dict.fromkeys(exact, 0.1)
    return [{"length": n, "exact": value, "answer_loss": losses[n]} for n, value in exact.items()]


def test_needles_tell_unsolved_collapse_and_forgetting_apart() -> None:
    unsolved = judge_needles(rows({64: 0.89, 128: 0.0}), rows({64: 0.0}), DEFAULT)
    assert (unsolved["solved"], unsolved["position"], unsolved["forgetting_position"]) == (False, None, None)
    assert unsolved["answer_loss_rises"] is None
    collapse = judge_needles(
        rows({64: 0.9, 96: 0.51, 128: 0.5, 256: 1.0}), rows({64: 0.9, 128: 0.0}), DEFAULT
    )
    assert (collapse["position"], collapse["held_to"]) == (128, 96)
    assert collapse["forgetting_position"] is None  # recent needles are lost there, too
    forgetting = judge_needles(rows({64: 1.0, 128: 0.9}), rows({64: 1.0, 128: 0.4}), DEFAULT)
    assert (forgetting["position"], forgetting["forgetting_position"]) == (None, 128)
    strict = judge_needles(rows({64: 1.0, 128: 0.7}), [], ThresholdsConfig(lost=0.8))
    assert strict["position"] == 128


def test_the_answers_loss_counts_as_infinite_where_it_is_not_finite() -> None:
    exact = {64: 1.0, 128: 1.0, 256: 0.0}
    found = judge_needles(rows(exact, {64: 0.1, 128: 0.19, 256: None}), [], DEFAULT)
    assert (found["answer_loss_rises"], found["loss_ratio"]) == (256, None)
    found = judge_needles(rows(exact, {64: 0.1, 128: 0.21, 256: 0.3}), [], DEFAULT)
    assert found["answer_loss_rises"] == 128
    assert found["loss_ratio"] == pytest.approx(3.0)


def curve(values: list[float | None], bucket: int = 16) -> dict[str, Any]:
    position = [bucket * i + (bucket + 1) / 2 for i in range(len(values))]
    return {"bucket": bucket, "position": position, "loss": values}


@pytest.mark.parametrize(
    ("values", "prompt", "solved", "position"),
    [
        ([2.0, 1.0, 4.0, 4.1], "documents", True, 49),
        ([2.0, 1.0, 4.0, 4.0], "documents", True, None),
        ([2.0, 1.0, 1.0, None], "documents", True, 49),
        ([5.5, 5.5, 20.0, 20.0], "documents", False, None),
        ([5.5, 5.5, 20.0, 20.0], "random", None, 33),
    ],
    ids=["above", "at the limit", "not finite", "chance", "random tokens"],
)
def test_loss_collapses_above_twice_its_maximum_inside(
    values: list[float | None], prompt: str, solved: bool | None, position: int | None
) -> None:
    found = judge_loss(curve(values), 32, 256, prompt, DEFAULT)
    assert (found["solved"], found["position"], found["to"]) == (solved, position, 64)
    assert found["loss_inside_max"] == values[0]


def test_the_border_of_collapse_is_found_by_halving() -> None:
    asked: list[int] = []

    def ask(length: int) -> dict[str, Any]:
        asked.append(length)
        return {"length": length, "exact": float(length < 700)}

    found = refined(ask, doubled_lengths(256, 2048), lost=0.5, halvings=3)
    assert [row["length"] for row in found] == sorted(asked)
    first = next(i for i, row in enumerate(found) if row["exact"] <= 0.5)
    low, high = found[first - 1]["length"], found[first]["length"]
    assert low < 700 <= high
    assert high / low < 2 ** (1 / 8) * 1.01
    assert len(refined(lambda n: {"length": n, "exact": 1.0}, [256, 512], 0.5, 3)) == 2
    assert len(refined(lambda n: {"length": n, "exact": 0.0}, [256, 512], 0.5, 3)) == 2
    assert doubled_lengths(256, 1000) == [256, 512, 1000]


def test_heads_without_a_state_or_without_forgetting_are_told_as_such() -> None:
    values = {name: np.zeros((4, 1, 2)) for name in MEASURES}
    values["variance"][:, 0, 1] = [1.0, 2.0, 7.9, 8.1]
    values["rms"][:] = 1.0
    measures = Measures(
        train_length=20,
        positions=np.array([10, 20, 30, 40]),
        values=values,
        loss={},
        channels_inside=[],
        channels_end=[],
        non_finite=None,
    )
    dead, growing = head_rows(measures, DEFAULT)
    assert (dead["variance_ratio"], dead["exceeds"]) == (None, None)
    assert (dead["retention"], dead["half_life"], dead["half_life_extrapolated"]) == (1.0, None, True)
    assert (growing["variance_ratio"], growing["exceeds"]) == (pytest.approx(4.05), 40)
    assert [row["head"] for row in collapsed_heads([dead, growing])] == [1]
    assert [row["head"] for row in over_retaining_heads([dead, growing], DEFAULT)] == [0, 1]


@pytest.mark.parametrize(("prompt", "rows"), [("newline", 1), ("sentence", 3), ("random", 3), ("passkey", 3)])
def test_any_stretch_of_a_prompt_is_cut_from_one_text(prompt: str, rows: int) -> None:
    config = parse(DiagnoseConfig, ["checkpoint=x", f"prompt={prompt}", "prompts=3", "seed=4"])
    source = prompt_source(prompt, config, DataConfig(), ByteTokenizer())
    whole = source(0, 3000)
    assert whole.shape == (rows, 3000)
    assert whole.dtype == np.int64
    for begin, end in ((0, 1), (1023, 1025), (1024, 2048), (333, 2777), (2999, 3000)):
        np.testing.assert_array_equal(source(begin, end), whole[:, begin:end])
    text = ByteTokenizer().decode(whole[0])
    known = {
        "newline": "\n" * 3000,
        "sentence": config.sentence * 5,
        "passkey": " The grass is green. The sky",
    }
    assert text.startswith(known.get(prompt, ""))
    assert rows == 1 or not np.array_equal(whole[0], whole[1])

"""DeepSpeed's settings: what does not combine is refused in one line, before anything is imported."""

import json
from pathlib import Path

import pytest

from conf.load import parse
from conf.schema import TrainConfig
from conf.zero import DeepSpeedConfig

DEEPSPEED = "trainer.strategy=deepspeed"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([DEEPSPEED, "deepspeed.stage=4"], "deepspeed.stage=4: must be 1, 2 or 3"),
        (
            [DEEPSPEED, "deepspeed.offload_parameters=true"],
            "deepspeed.offload_parameters=True: needs .*stage=3",
        ),
        (["deepspeed.stage=3"], "deepspeed.stage=3: belongs to trainer.strategy=deepspeed"),
        (["trainer.strategy=ddp", "deepspeed.offload_optimizer=true"], "offload_optimizer=True: belongs to"),
        ([DEEPSPEED, "deepspeed.config=none.json"], "deepspeed.config=none.json: cannot be read"),
        (
            [
                *(
                    DEEPSPEED,
                    "deepspeed.stage=3",
                    "initial_state.name=carried",
                    "initial_state.bptt_segments=2",
                ),
                *("data.name=documents", "data.documents.layout=consecutive"),
            ],
            "initial_state.bptt_segments=2: stage 3",
        ),
    ],
)
def test_what_does_not_combine_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        parse(TrainConfig, argv)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be an object"),
        ('{"bf16": {"enabled": true}}', "sets bf16: leave that to trainer.precision"),
        ('{"zero_optimization": {"stage": 3}}', "sets stage: leave that to deepspeed.stage"),
    ],
)
def test_a_file_that_contradicts_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "more.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        DeepSpeedConfig(config=str(file))


def test_shipped_files_are_accepted() -> None:
    files = list((Path(__file__).parents[2] / "conf" / "deepspeed").glob("*.json"))
    assert files
    for file in files:
        assert DeepSpeedConfig(config=str(file)).further() == json.loads(file.read_text())

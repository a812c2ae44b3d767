"""Any task trains, validates, is diagnosed and measured by the commands that passkeys have."""

import json
from pathlib import Path

import datasets
import pytest

from lightning_modules.diagnose import main as diagnose
from lightning_modules.evaluate import main as evaluate
from lightning_modules.train import main as train

SMOKE = "conf/train/smoke.yaml"
UNTRACKED = "tracking.enabled=false"
SHORT = ("trainer.max_steps=4", "trainer.val_every=2", "trainer.log_every=2", "data.val_sequences=4")

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.fixture(autouse=True)
def token_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    "settings",
    [
        ("data.name=mqar", "data.tasks.pairs=4", "probe.factor=2"),
        ("data.name=variable_tracking", "data.train_length=256", "initial_state.name=carried"),
        ("data.name=niah_essay", "data.train_length=256", "data.documents.source=BOOKS"),
    ],
    ids=lambda settings: settings[0],
)
def test_a_task_goes_all_the_way(settings: tuple[str, ...], tmp_path: Path) -> None:
    books = tmp_path / "books"
    books.mkdir()
    for i in range(4):
        (books / f"{i}.txt").write_text(f"Once there was number {i}. It was read by nobody! " * 300)
    settings = tuple(setting.replace("BOOKS", str(books)) for setting in settings)
    run = tmp_path / "run"
    train([SMOKE, *settings, *SHORT, UNTRACKED, f"run_dir={run}"])
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    assert 0 <= metrics["val/digits"] <= 1
    assert metrics["val/answer_loss"] > 1

    name = settings[0].removeprefix("data.name=")
    shape = ("tasks.lengths=[256]", "tasks.depths=2", "tasks.prompts_per_depth=2", "loss.length=512")
    out = tmp_path / "evaluation"
    evaluate([f"checkpoint={run}", f"suites=[{name},loss]", *shape, UNTRACKED, f"run_dir={out}"])
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["tasks"][name]["by_length"][0]["prompts"] == 4
    assert evaluation["loss"]["text"] == f"{name} prompts, one after another"
    out = tmp_path / "diagnosis"
    diagnose([f"checkpoint={run}", "length=512", "prompts=2", UNTRACKED, f"run_dir={out}"])
    diagnosis = json.loads((out / "diagnosis.json").read_text())
    assert diagnosis["prompt"]["text"] == "prompts of the task, one after another"


def test_too_short_a_row_names_what_a_prompt_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train([SMOKE, "data.name=niah_multikey_3", UNTRACKED, f"run_dir={tmp_path}"])
    error = capsys.readouterr().err
    assert "data.train_length=128: a prompt of niah_multikey_3 needs at least" in error
    assert error.count("\n") == 1

"""The task suites and perplexity of a user's text, through the command: rows, figures, words, sharing."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.load import from_dict, parse, to_dict
from conf.measure_schema import EvaluateConfig
from conf.schema import DataConfig, DocumentsConfig, ModelConfig, TrainConfig
from conf.tasks import IN_TEXT, TASKS
from data.layout import Layout
from data.sources import locate
from data.store import build_store
from data.tasks.registry import build_task
from data.tokenizers import ByteTokenizer
from kernels.ssd import Mitigation
from lightning_modules.backbone import Mamba2LM
from lightning_modules.checkpoints import write_checkpoint
from lightning_modules.evaluate import main
from lightning_modules.evaluation import answers, texts
from lightning_modules.evaluation.bench_report import compare, draw, tables
from lightning_modules.evaluation.streaming import Reader
from lightning_modules.evaluation.tasks import conclude, prompts

SMALL = {"common_times": 6, "rare_times": 2, "common": 4, "pairs": 8, "updates": 4}
TINY = ("model.d_model=16", "model.d_state=8", "model.headdim=8", "model.chunk_size=16")
UNTRACKED = "tracking.enabled=false"


@pytest.fixture(autouse=True)
def token_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def books(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    for i in range(6):
        size = 40 if i == 5 else 400
        (folder / f"{i}.txt").write_text(f"Once there was number {i}. It was read by nobody! " * size)
    return folder


def make(name: str, books: Path, **settings: Any) -> Any:
    data = from_dict(DataConfig, {"name": name, "train_length": 2048, "tasks": SMALL | settings})
    text = None
    if name in IN_TEXT:
        text = build_store(locate(DocumentsConfig(source=str(books))), ByteTokenizer()).whole()
    return build_task(name, data, ByteTokenizer(), text)


def checkpoint(folder: Path, *overrides: str) -> Path:
    config = parse(TrainConfig, [*TINY, "data.train_length=512", *overrides])
    (folder / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    state = {f"model.{name}": value for name, value in Mamba2LM(config.model).state_dict().items()}
    contents = {"state_dict": state, "config": to_dict(config), "step": 7}
    write_checkpoint(contents, folder / "checkpoints" / "step=0000007.ckpt")
    return folder


@pytest.fixture
def guesser() -> Mamba2LM:
    torch.manual_seed(0)
    model = Mamba2LM(
        ModelConfig(d_model=32, d_state=8, headdim=16, chunk_size=16, tie_embeddings=False, init_std=1.0)
    )
    return model.eval()


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_scored_as_if_every_prompt_were_read_whole(
    name: str, guesser: Mamba2LM, books: Path
) -> None:
    task = make(name, books)
    layout = prompts(task, task.shortest() + 200, depths=4, texts=3, seed=1)
    reader = Reader(guesser, Mitigation(), 300)
    scores = answers.score(reader, layout)
    assert reader.tokens == answers.tokens_to_read(layout) <= layout.ids(0, layout.length - 1).size
    ids, parts = layout.ids(0, layout.length), layout.answer(0, layout.length)[:, 1:]
    with torch.inference_mode():
        logits = guesser(torch.from_numpy(ids)).logits[:, :-1]
    surprise = -logits.log_softmax(-1).gather(2, torch.from_numpy(ids[:, 1:, None]))[..., 0].numpy()
    right = logits.argmax(-1).numpy() == ids[:, 1:]
    for i, row in enumerate(parts):
        share = np.mean([right[i][row == part].all() for part in range(1, row.max() + 1)])
        assert scores.parts[i] == pytest.approx(share)
        assert scores.tokens[i] == pytest.approx(right[i][row > 0].mean())
        assert scores.exact[i] == (share == 1)
        assert scores.loss[i] == pytest.approx(surprise[i][row > 0].mean(), rel=1e-3)


class Oracle(Mamba2LM):
    """Knows every answer; of the parts in `wrong` it gives another token."""

    def __init__(self, layout: Layout, wrong: tuple[int, ...] = ()) -> None:
        super().__init__(ModelConfig(d_model=256, headdim=64, vocab_size=512, tie_embeddings=False))
        self.layout, self.wrong, self.at = layout, wrong, 0
        with torch.no_grad():
            self.lm_head.weight.zero_()
            self.lm_head.weight[:256].copy_(torch.eye(256))

    def hidden(self, ids: Tensor, state: object = None, **kwargs: object) -> tuple[Tensor, None]:  # type: ignore[override]
        end = self.at + ids.shape[1]
        following = self.layout.ids(self.at + 1, end + 1)
        parts = self.layout.answer(self.at + 1, end + 1)
        self.at = end
        told = np.where(np.isin(parts, self.wrong), (following + 1) % 256, following)
        return torch.nn.functional.one_hot(torch.from_numpy(told), 256).float(), None


def test_parts_tell_how_much_of_an_answer_is_right(books: Path) -> None:
    task = make("common_words", books)
    layout = prompts(task, task.shortest() + 100, depths=1, texts=3, seed=1)
    for wrong, share in (((), 1.0), ((2,), 0.75), ((1, 4), 0.5)):
        row = answers.accuracy(answers.score(Reader(Oracle(layout, wrong), Mitigation(), 128), layout))
        assert (row["accuracy"], row["exact"], row["prompts"]) == (share, float(not wrong), 3)
        assert row["accuracy_low"] < row["accuracy"] or share == 0
        assert row["accuracy_high"] >= row["accuracy"]


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("niah_single_1", 6.1),
        ("niah_essay", 6.1),
        ("induction_heads", 6.1),
        ("passkey_recent", 1.6),
        ("passkey_many", 1.1),
        ("niah_multikey_2", 1.1),
        ("niah_multikey_3", 1.3),
    ],
)
def test_a_grid_of_ten_depths_reads_its_text_once(
    name: str, most: float, guesser: Mamba2LM, books: Path
) -> None:
    task, length = make(name, books), 8192
    layout = prompts(task, length, depths=10, texts=1, seed=1)
    reader = Reader(guesser, Mitigation(), 4096)
    answers.score(reader, layout)
    assert 0.9 < reader.tokens / length <= most
    if name != "niah_essay":  # whose text here is too short
        assert answers.tokens_to_read(prompts(task, 262_144, 10, 1, seed=1)) <= most * 262_144


def test_the_command_leaves_rows_figures_and_words(
    books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = checkpoint(tmp_path / "run")
    suites = "suites=[mqar,niah_single_1,niah_essay,facts,perplexity]"
    shape = ("tasks.lengths=[512,1024]", "tasks.depths=3", "tasks.prompts_per_depth=2")
    settings = ("tasks.settings.pairs=4", "perplexity.documents=3", f"text.source={books}")
    main([f"checkpoint={run}", f"run_dir={tmp_path / 'out'}", UNTRACKED, suites, *shape, *settings])
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert list(evaluation["tasks"]) == ["mqar", "niah_single_1", "niah_essay", "facts"]
    for name, task in evaluation["tasks"].items():
        assert [(row["length"], row["prompts"]) for row in task["by_length"]] == [(512, 6), (1024, 6)]
        for row in task["by_length"]:
            assert 0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1
            assert 0 < row["chance"] < 1
        assert 0 < task["tokens_read"] <= task["tokens_without_sharing"] == 6 * (511 + 1023)
        assert result["metrics"][f"{name}/accuracy_at_512"] == task["by_length"][0]["accuracy"]
    assert evaluation["tasks"]["mqar"]["by_depth"] == []
    assert evaluation["tasks"]["mqar"]["by_length"][0]["chance"] == 1 / 4 + 3 / 4 / 85
    cells = evaluation["tasks"]["niah_single_1"]["by_depth"]
    assert [round(cell["depth"], 2) for cell in cells[:3]] == [0.17, 0.5, 0.83]
    figures = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert figures == {
        *("mqar.png", "niah_single_1.png", "niah_single_1_heatmap.png", "niah_essay.png"),
        *("niah_essay_heatmap.png", "facts.png", "facts_heatmap.png", "document_loss.png"),
    }
    perplexity = evaluation["perplexity"]
    assert (perplexity["documents"], perplexity["length"]) == (3, 32 * 512)
    assert 100 < perplexity["perplexity"][0] < 600  # 256, of a model that knows nothing
    assert perplexity["loss_low"][0] < perplexity["loss"][0] < perplexity["loss_high"][0]
    assert result["metrics"]["perplexity/in_length"] > 100
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert "mqar: 0." in printed
    assert "unsolved" in printed
    assert "Perplexity of 3 documents" in printed


def test_perplexity_is_of_documents_from_their_beginnings(books: Path, tmp_path: Path) -> None:
    run = checkpoint(tmp_path / "run")
    from lightning_modules.checkpoints import load_model
    from lightning_modules.evaluation.run import Subject

    command = [f"checkpoint={run}", f"text.source={books}", "perplexity.documents=5", "perplexity.length=700"]
    config = parse(EvaluateConfig, command)
    trained = Subject.load(config).trained
    suite = texts.plan_perplexity(config, trained.data, ByteTokenizer())
    reader = Reader(load_model(run), Mitigation(), 256)
    result = suite.run(reader, lambda length: Mitigation())
    expected = []
    for i in range(5):  # the sixth is shorter than perplexity.length... and the only one left out
        text = (books / f"{i}.txt").read_bytes()[:701]
        ids = torch.tensor(list(text))
        with torch.inference_mode():
            logits = reader.model(ids[None, :-1]).logits[0]
        expected.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
    losses = torch.stack(expected)[:, :128]
    assert result["loss"][0] == pytest.approx(float(losses.mean()), rel=1e-5)
    spread = float(losses.mean(1).std()) * 2.776445 / math.sqrt(5)  # t of 4 degrees of freedom
    assert result["loss_high"][0] - result["loss"][0] == pytest.approx(spread, rel=1e-3)
    assert result["perplexity"][0] == pytest.approx(math.exp(result["loss"][0]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["suites=[mqr]"], "choose from"),
        (["suites=[mqar]", "tasks.settings.piars=3"], "tasks.settings"),
        (["suites=[mqar]", "tasks.lengths=[20]"], "a prompt of mqar needs at least 64 tokens"),
        (["suites=[mqar]", "tasks.settings.vocabulary=300"], "the model has 256 token ids"),
        (["suites=[mqar]", "tasks.settings.pairs=100"], "only 85 of 256 token ids are keys"),
        (["suites=[niah_essay]", "text.source=/nowhere/at/all"], "text.source=/nowhere/at/all"),
        (["suites=[perplexity]", "text.source=BOOKS", "perplexity.length=100000"], "only 0 documents of"),
        (["suites=[facts]", "text.source=BOOKS", "tasks.settings.facts=BOOKS"], "is not bAbI's"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes_are_answered_in_one_line(
    overrides: list[str], message: str, books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = checkpoint(tmp_path / "run")
    overrides = [override.replace("BOOKS", str(books)) for override in overrides]
    with pytest.raises(SystemExit) as stop:
        main([f"checkpoint={run}", f"run_dir={tmp_path / 'out'}", UNTRACKED, *overrides])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_conclusion_tells_solved_from_lost_and_from_chance() -> None:
    def row(length: int, accuracy: float, low: float) -> dict[str, Any]:
        return {"length": length, "accuracy": accuracy, "accuracy_low": low, "chance": 0.25}

    solved = conclude("mqar", 256, [row(256, 0.98, 0.9), row(512, 0.95, 0.9)])
    assert solved == "mqar: 0.98 of answers right at the training length (chance 0.250), 0.95 at 512."
    lost = conclude("mqar", 256, [row(256, 0.98, 0.9), row(512, 0.45, 0.4), row(1024, 0.3, 0.2)])
    assert lost.endswith("at most 0.5 from 512 tokens on. No better than chance at 1,024 tokens.")
    unsolved = conclude("mqar", 128, [row(256, 0.6, 0.5)])
    assert unsolved.endswith("right at 256 tokens (chance 0.250): unsolved, below 0.9.")


def test_a_comparison_of_mitigations_shows_every_task() -> None:
    def measured(accuracy: float) -> tuple[dict[str, Any], dict[str, float]]:
        rows = [{"length": n, "accuracy": accuracy} for n in (256, 512)]
        mitigation = {"name": "none"} if accuracy == 1 else {"name": "hard_reset", "every": 64}
        tasks = {"mqar": {"by_length": rows}, "facts": {"by_length": rows}}
        known = {"mitigation": mitigation, "passkey": None, "loss": None, "tasks": tasks, "conclusion": {}}
        return known, {"mqar/accuracy_at_256": accuracy}

    report = {"checkpoint": "x", "train_length": 256, "rows": compare([measured(1.0), measured(0.25)])}
    shown = tables(report)[1:]
    assert [table.title for table in shown] == [
        "mqar: answers right by prompt length",
        "facts: answers right by prompt length",
    ]
    assert list(shown[0].columns[1].cells) == ["1.00", "0.25"]
    assert [axes.get_ylabel() for axes in draw(report).axes] == [
        "answers right, mqar",
        "answers right, facts",
    ]
    with pytest.raises(ValueError, match="add passkey, loss or a task"):
        parse(EvaluateConfig, ["checkpoint=x", "mitigation.name=all", "suites=[states]"])

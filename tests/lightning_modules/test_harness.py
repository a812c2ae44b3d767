"""The harness itself, where it is installed, on tasks in a local folder."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.load import parse, to_dict
from conf.schema import TrainConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.checkpoints import write_checkpoint
from lightning_modules.harness import main

INSTALL = "lm-evaluation-harness: .venv/bin/pip install -c constraints.txt -e '.[lm-eval]'"
TINY = ("model.d_model=16", "model.d_state=8", "model.headdim=8", "model.chunk_size=16")
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no", "maybe"]
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
WRITING = """
task: tiny_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
generation_kwargs: {{until: ["never"], max_gen_toks: 7, do_sample: false}}
metric_list: [{{metric: bypass}}]
"""


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = parse(TrainConfig, [*TINY, "data.train_length=128"])
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    state = {f"model.{name}": value for name, value in Mamba2LM(config.model).state_dict().items()}
    contents = {"state_dict": state, "config": to_dict(config), "step": 7}
    write_checkpoint(contents, tmp_path / "run" / "checkpoints" / "step=0000007.ckpt")
    return tmp_path / "run"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    questions = [{"question": f"Is {i} even? " * (1 + 40 * i) + "Answer:", "label": i % 2} for i in range(5)]
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("writing", WRITING)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


@pytest.mark.filterwarnings("default")  # of the harness' own
def test_local_tasks_are_answered_whole_and_with_their_lengths(
    checkpoint: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason=INSTALL)
    names = "tasks=[tiny_choice,tiny_rolling,tiny_writing]"
    command = [f"checkpoint={checkpoint}", names, f"include_path={tasks}", "tracking.enabled=false"]
    main([*command, f"run_dir={tmp_path / 'out'}", "segment=256", "rows=4"])
    found = json.loads((tmp_path / "out" / "harness.json").read_text())
    results, tokens = found["results"], found["tokens"]
    texts = [json.loads(line)["question"] for line in (tasks / "questions.jsonl").read_text().splitlines()]

    from lightning_modules.checkpoints import load_model

    model = load_model(checkpoint)

    def log_p(text: str, given: int) -> float:
        ids = torch.tensor([[0, *text.encode()]])
        with torch.inference_mode():
            losses, _ = model.token_losses(ids[:, :-1], ids[:, 1:])
        return -float(losses[0, given:].double().sum())

    def choose(text: str) -> int:
        # The harness puts a blank before an answer; the model reads no end-of-text token before a context.
        scores = []
        for choice in (" yes", " no", " maybe"):
            ids = torch.tensor([list((text + choice).encode())])
            with torch.inference_mode():
                losses, _ = model.token_losses(ids[:, :-1], ids[:, 1:])
            scores.append(-float(losses[0, -len(choice) :].sum()))
        return int(np.argmax(scores))

    right = np.mean([choose(text) == i % 2 for i, text in enumerate(texts)])
    assert results["tiny_choice"]["acc,none"] == pytest.approx(right)
    bits = -sum(log_p(text, 0) for text in texts) / sum(map(len, texts)) / math.log(2)
    assert results["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    longest = max(map(len, texts))
    assert longest > 1500  # many times the training length, and the segment
    assert tokens["tiny_rolling"]["longest"] == 1 + longest
    assert tokens["tiny_choice"]["longest"] == longest + len(" maybe")
    assert tokens["tiny_writing"]["shortest"] == min(map(len, texts)) + 7
    scores = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert len(scores) == 3 * 5
    counted = {row["doc_id"]: row["tokens"] for row in scores if row["task"] == "tiny_choice"}
    assert counted == {i: len(text) + len(" maybe") for i, text in enumerate(texts)}
    assert np.mean([row["acc"] for row in scores if row["task"] == "tiny_choice"]) == pytest.approx(right)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["metrics"]["harness/tiny_choice/acc"] == pytest.approx(right)
    assert "nothing was truncated (trained at 128)" in capsys.readouterr().out

    with pytest.raises(SystemExit):
        main([*command, f"run_dir={tmp_path / 'short'}", "max_length=500"])
    error = capsys.readouterr().err
    assert "max_length=500: document" in error
    assert "nothing is truncated here" in error
    with pytest.raises(SystemExit):
        main([*command, "tasks=[no_such_task]", f"run_dir={tmp_path / 'none'}"])
    assert "the harness has no no_such_task" in capsys.readouterr().err


def test_an_empty_continuation_is_certain(checkpoint: Path) -> None:
    """Of which the harness' own models fail: an assertion."""
    pytest.importorskip("lm_eval", reason=INSTALL)
    from lm_eval.api.instance import Instance

    from data.tokenizers import load_tokenizer
    from lightning_modules.checkpoints import load_model
    from lightning_modules.lm_harness.model import LongstateLM
    from lightning_modules.lm_harness.reading import BatchReader

    reader = BatchReader(load_model(checkpoint), lambda length: None, 4096, 4)
    model = LongstateLM(reader, load_tokenizer("bytes"), None, 8)
    pairs = [("a b", ""), ("a b ", ""), ("", ""), ("a b", " c"), ("", "x"), ("a ", "\n")]
    requests = [Instance("loglikelihood", {}, pair, i, metadata=("t", i, 1)) for i, pair in enumerate(pairs)]
    found = model.loglikelihood(requests)
    assert found[:3] == [(0.0, True)] * 3
    assert all(log_p < 0 for log_p, _ in found[3:])
    assert [length.tokens for length in model.lengths] == [3, 4, 1, 5, 2, 3]
    assert model.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, ("",), 0, metadata=("t", 0, 1))]
    ) == [0.0]


def test_without_the_extra_one_line_says_how_to_get_it(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_modules.harness.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main([f"checkpoint={checkpoint}", "tasks=[piqa]"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "pip install" in error
    assert error.count("\n") == 1

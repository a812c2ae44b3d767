"""An exported folder: loaded by transformers with its tokenizer, and a card that says what was measured."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from data.tokenizers import ByteTokenizer
from lightning_modules.checkpoints import load_model
from lightning_modules.convert import main as convert
from lightning_modules.diagnose import main as diagnose
from lightning_modules.evaluate import main as evaluate
from tests.lightning_modules.layouts import CASES, config_of, write_state_spaces
from tests.lightning_modules.test_evaluate_command import QUICK, UNTRACKED, write_run

LONGER = ("data.train_length=256", "data.curriculum_length=128", "data.curriculum_steps=100")
TEXT = "Grüße, 12 tokens…\n\n\x00 end\t"


def section(card: str, title: str) -> str:
    return card.partition(f"\n## {title}\n")[2].partition("\n## ")[0].strip()


def test_an_export_of_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", *LONGER)
    result = {"metrics": {"val/loss": 1.25, "speed/tokens_per_second": 9.0}}
    (run / "result.json").write_text(json.dumps(result))
    evaluate([f"checkpoint={run}", f"run_dir={tmp_path}/measured", *QUICK, UNTRACKED])
    other = write_run(tmp_path / "other", "model.d_state=16")
    evaluate([f"checkpoint={other}", f"run_dir={tmp_path}/newer", *QUICK, "passkey.prompts=5", UNTRACKED])
    convert([f"source={run}", f"target={tmp_path}/hf", "layout=hf"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer(TEXT)["input_ids"] == ByteTokenizer().encode(TEXT).tolist()
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert (tokenizer.eos_token_id, model.config.eos_token_id) == (0, 0)
    ids = torch.randint(256, (2, 40))
    with torch.no_grad():
        ours = load_model(run)(ids).logits
        torch.testing.assert_close(model(ids).logits, ours, atol=1e-4, rtol=1e-4)
        greedy = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert model.generate(ids[:1], generation_config=greedy).shape == (1, 45)

    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    lengths = section(card, "Training lengths")
    assert "- 100 steps at 128 tokens\n- 900 steps at 256 tokens" in lengths
    assert "val/loss: 1.25" in lengths
    assert "speed" not in lengths
    # 2 layers x 32 channels x 8, and 2 layers x 48 channels x 3 taps
    assert section(card, "State size").startswith(
        "N_S = 800 numbers a sequence, whatever its length: 512 in SSM"
    )
    assert "unsolved at the training length" in section(card, "Collapse position")
    recent = json.loads((tmp_path / "measured" / "evaluation.json").read_text())["passkey"]["recent"][1]
    cell = f"{recent['exact']:.2f} ({recent['exact_low']:.2f} to {recent['exact_high']:.2f}, 4 prompts)"
    assert f"| 256 | {cell} | " in section(card, "Passkey"), "the newest of this run, not of another"
    assert "transformers.Mamba2ForCausalLM of the target" in section(card, "The same model")


def test_what_is_not_known_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_state_spaces(tmp_path / "published", config_of(CASES["groups"]), torch.float32)
    convert([f"source={tmp_path}/published", f"target={tmp_path}/hf", "layout=hf"])
    card = (tmp_path / "hf" / "README.md").read_text()
    assert section(card, "Training lengths") == "Unknown: the source held no training config."
    assert section(card, "Collapse position") == section(card, "Passkey") == "Not measured."
    assert "AutoTokenizer" not in card
    with pytest.raises(SystemExit):
        convert(
            [f"source={tmp_path}/published", f"target={tmp_path}/b", "layout=hf", f"evaluation={tmp_path}"]
        )
    assert f"error: evaluation={tmp_path}: no evaluation.json there" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_published_model_is_measured_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """diagnose and evaluate take the directory itself; what it cannot say is asked for in one line."""
    published = tmp_path / "published"
    write_state_spaces(published, config_of({**CASES["groups"], "vocab_size": 256}), torch.float32)
    line = [f"checkpoint={published}", UNTRACKED]
    for settings, missing in (([], "data.train_length=2048"), (["data.train_length=128"], "data.tokenizer=")):
        with pytest.raises(SystemExit):
            evaluate([*line, *settings])
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "holds no training config: say what it was trained with" in error
        assert missing in error
    line += ["data.train_length=128", "data.tokenizer=bytes", "data.name=passkey"]
    evaluate([*line, *QUICK, f"run_dir={tmp_path}/evaluated"])
    assert json.loads((tmp_path / "evaluated" / "evaluation.json").read_text())["train_length"] == 128
    diagnose([*line, "length=512", "needle_prompts=2", f"run_dir={tmp_path}/diagnosed"])
    diagnosis = json.loads((tmp_path / "diagnosed" / "diagnosis.json").read_text())
    assert len(diagnosis["heads"]) == 2 * 8
    assert "data.train_length=128" in diagnosis["command"]
    convert([f"source={published}", f"target={tmp_path}/hf", "layout=hf"])
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "Heads whose states leave their range" in section(card, "Collapse position")
    # A run says itself how it was trained.
    run = write_run(tmp_path / "run")
    with pytest.raises(SystemExit):
        evaluate([f"checkpoint={run}", "data.train_length=64", UNTRACKED])
    assert "says itself how it was trained" in capsys.readouterr().err

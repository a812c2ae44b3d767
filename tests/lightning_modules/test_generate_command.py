"""The command: what it prints, what it reads and keeps, what it refuses."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conf.generate_schema import GenerateConfig
from conf.load import parse
from conf.schema import TrainConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.checkpoints import load_model, save_model
from lightning_modules.convert import main as convert
from lightning_modules.generate import main
from lightning_modules.generation import run as command
from tests.lightning_modules.made_tokenizers import byte_level
from tests.lightning_modules.test_evaluate_command import write_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("trained") / "run")


def call(capsys: pytest.CaptureFixture[str], checkpoint: Path, *arguments: str) -> str:
    main([f"checkpoint={checkpoint}", *arguments])
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").strip()


def test_the_text_is_what_model_generate_makes(capsys: Any, checkpoint: Path) -> None:
    prompt = "Hi ${x} ??? [1, a: b"
    out = call(capsys, checkpoint, f"prompt={prompt}", "temperature=1", "seed=3", "max_new_tokens=60")
    from data.tokenizers import ByteTokenizer

    tokenizer = ByteTokenizer()
    model = load_model(checkpoint)
    expected = model.generate(
        [tokenizer.encode(prompt)], tokenizer=tokenizer, temperature=1.0, seed=3, max_new_tokens=60
    )
    assert out == expected.texts[0] + "\n"
    assert len(expected.texts[0]) > 10


def test_a_published_model_speaks_as_it_is(capsys: Any, tmp_path: Path, checkpoint: Path) -> None:
    """In another layout, with the tokenizer beside it or said; a guest is told apart."""
    prompt = ("prompt=Hello", "max_new_tokens=20")
    spoken = call(capsys, checkpoint, *prompt)
    for layout in ("hf", "state-spaces"):
        convert([f"source={checkpoint}", f"target={tmp_path / layout}", f"layout={layout}"])
        capsys.readouterr()
        assert call(capsys, tmp_path / layout, *prompt) == spoken
    (tmp_path / "hf" / "tokenizer_config.json").unlink()
    (tmp_path / "hf" / "tokenizer.json").unlink()
    assert "give tokenizer=bytes" in refusal(capsys, f"checkpoint={tmp_path / 'hf'}", *prompt)
    assert call(capsys, tmp_path / "hf", *prompt, "tokenizer=bytes") == spoken
    guest = {"model_type": "rwkv", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 256}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(guest))
    assert "use transformers' own generate" in refusal(capsys, f"checkpoint={tmp_path / 'hf'}", *prompt)


def test_several_prompts_are_lines_of_json_and_as_each_alone(capsys: Any, checkpoint: Path) -> None:
    texts = ["a", "the second prompt", "3"]
    settings = ("temperature=1", "max_new_tokens=15")
    for size in (1, 2, 8):
        given = [f"prompt={text}" for text in texts]
        out = call(capsys, checkpoint, *given, *settings, f"batch_size={size}")
        found = {row["prompt"]: row for row in map(json.loads, out.splitlines())}
        assert sorted(found) == [0, 1, 2]
        for number, text in enumerate(texts):
            alone = call(capsys, checkpoint, f"prompt={text}", *settings, f"seed={number}")
            assert found[number]["text"] == alone[:-1]
            assert found[number]["tokens"] <= 15
            assert found[number]["finish"] in ("length", "end")


def test_text_comes_while_it_is_made(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token's text is written and flushed before the next token is made."""
    written: list[str] = []

    class Terminal(io.StringIO):
        def flush(self) -> None:
            written.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Terminal())
    main([f"checkpoint={checkpoint}", "prompt=a", "temperature=1", "max_new_tokens=60", "seed=2"])
    assert len(set(written)) > 15


def test_a_document_is_read_once_and_questioned_many_times(
    capsys: Any, checkpoint: Path, tmp_path: Path
) -> None:
    document, state = tmp_path / "document.txt", tmp_path / "document.state"
    document.write_text("Some long text, told with care. " * 40)
    settings = ("temperature=1", "max_new_tokens=9")
    assert (
        call(capsys, checkpoint, f"prompt_file={document}", "max_new_tokens=0", f"save_state={state}") == ""
    )
    questions = ("prompt=Who?", "prompt=And why did they?")
    asked = call(capsys, checkpoint, f"state={state}", *questions, *settings)
    assert call(capsys, checkpoint, f"prompt_file={document}", *questions, *settings) == asked
    for number, question in enumerate(questions):
        whole = document.read_text() + question.removeprefix("prompt=")
        alone = call(capsys, checkpoint, f"prompt={whole}", *settings, f"seed={number}")
        rows = {row["prompt"]: row["text"] for row in map(json.loads, asked.splitlines())}
        assert rows[number] == alone[:-1]


def test_a_conversation_goes_on_in_the_same_state(capsys: Any, checkpoint: Path, tmp_path: Path) -> None:
    state, settings = tmp_path / "talk.state", ("max_new_tokens=4", "temperature=1")
    mitigation = ("mitigation.name=sliding_window", "mitigation.window=50")
    first = call(capsys, checkpoint, "prompt=Hello", f"save_state={state}", *settings, *mitigation)
    second = call(capsys, checkpoint, "prompt= again", f"state={state}", *settings, *mitigation)
    model = load_model(checkpoint)
    from data.tokenizers import ByteTokenizer
    from kernels.ssd import Mitigation

    options: Any = {
        "tokenizer": ByteTokenizer(),
        "temperature": 1.0,
        "max_new_tokens": 4,
        "mitigation": Mitigation("sliding_window", window=50),
    }
    one = model.generate([ByteTokenizer().encode("Hello")], **options)
    assert one.texts[0] + "\n" == first
    whole = [*b"Hello", *one.tokens[0], *b" again"]
    assert model.generate([whole], **options).texts[0] + "\n" == second


@pytest.mark.parametrize(
    "mitigation",
    [
        ("name=forget_more", "alpha_scale=0.5"),
        ("name=state_norm", "max_norm=0.001", "every=3"),
        ("name=sliding_window", "window=3"),
        ("name=hard_reset", "every=4"),
    ],
)
def test_a_mitigation_changes_what_is_made(
    capsys: Any, checkpoint: Path, mitigation: tuple[str, ...], tmp_path: Path
) -> None:
    """The state at the end tells: a model without training says much the same under any."""
    states = []
    for settings in ((), tuple(f"mitigation.{setting}" for setting in mitigation)):
        path = tmp_path / f"{len(states)}.state"
        call(capsys, checkpoint, "prompt=abcdef", "max_new_tokens=9", f"save_state={path}", *settings)
        states.append(path.read_bytes())
    assert states[0] != states[1]
    assert mitigation[0].removeprefix("name=").encode() in states[1]


def test_a_calibrated_mitigation_leaves_the_output_clean(
    capsys: Any, checkpoint: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(checkpoint, tmp_path / "run"))
    given = ("prompt=ab", "max_new_tokens=3", "mitigation.calibration=auto", "mitigation.name=state_norm")
    out = call(capsys, own, *given, "mitigation.every=4")
    assert len(out) <= 4
    assert (own / "calibration-state_norm.json").is_file()
    message = refusal(
        capsys, f"checkpoint={own}", *given[:2], "mitigation.name=token_filter", "mitigation.calibration=auto"
    )
    assert message.startswith("mitigation.length=None: calibrated thresholds depend on")


def test_the_documentation_holds(checkpoint: Path, tmp_path: Path) -> None:
    """Its commands are ones that the config takes, its Python runs."""
    text = (ROOT / "docs" / "generation.md").read_text()
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        for line in block.splitlines():
            assert parse(GenerateConfig, [w for w in shlex.split(line)[3:] if not w.startswith("prompt=")])
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet.replace("runs/demo", str(checkpoint)), names)
    assert len(names["again"].texts) == 2


def test_prompts_from_files_and_standard_input(capsys: Any, checkpoint: Path, tmp_path: Path) -> None:
    settings = ("temperature=1", "max_new_tokens=8")
    lines, text = tmp_path / "prompts.jsonl", tmp_path / "prompt.txt"
    lines.write_text('"one"\n\n{"prompt": "two\\nlines", "id": 7}\n')
    text.write_text("two\nlines")
    rows = [
        json.loads(line) for line in call(capsys, checkpoint, f"prompt_file={lines}", *settings).splitlines()
    ]
    second = next(row["text"] for row in rows if row["prompt"] == 1)
    assert call(capsys, checkpoint, f"prompt_file={text}", *settings, "seed=1") == second + "\n"
    line = [sys.executable, "-m", "lightning_modules.generate", f"checkpoint={checkpoint}"]
    line += ["prompt_file=/dev/stdin", *settings, "seed=1", "threads=1"]
    done = subprocess.run(line, cwd=ROOT, input=b"two\nlines", capture_output=True, timeout=60)
    assert done.stdout.decode() == second + "\n", done.stderr


def test_reading_is_shown_token_by_token(
    capsys: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The bar is told the whole and each segment; all of it before the first text."""
    shown: list[Any] = []

    @contextmanager
    def bar(doing: str, total: int) -> Any:
        shown.append((doing, total))
        yield shown.append
        shown.append("end")

    monkeypatch.setattr(command, "show_progress", bar)
    call(capsys, checkpoint, f"prompt={'x' * 100}", "segment_length=32", "max_new_tokens=2")
    assert shown == [("reading", 100), 32, 32, 32, 4, "end"]
    main([f"checkpoint={checkpoint}", "prompt=abc", "max_new_tokens=2"])
    captured = capsys.readouterr()
    assert "read 3 tokens" in captured.err


def test_bpe_text_and_padded_vocabulary(capsys: Any, tmp_path: Path) -> None:
    """A tokenizer that is named, a model with more ids than it: only known ones are chosen."""
    config = parse(TrainConfig, ["model.d_model=16", "model.headdim=8", "model.vocab_size=400"])
    tokenizer = byte_level(tmp_path / "tokenizer")
    torch.manual_seed(0)
    save_model(Mamba2LM(config.model), tmp_path / "model")
    given = (f"tokenizer={tmp_path / 'tokenizer'}", "prompt=你好", "temperature=1", "max_new_tokens=300")
    out = call(capsys, tmp_path / "model", *given)
    model = load_model(tmp_path / "model")
    made = model.generate(
        [tokenizer.encode("你好")], tokenizer=tokenizer, temperature=1.0, max_new_tokens=300
    )
    assert out == tokenizer.decode(made.tokens[0]) + "\n"
    assert max(made.tokens[0]) < tokenizer.vocab_size < 400
    message = refusal(capsys, f"checkpoint={tmp_path / 'model'}", "prompt=a")
    assert message.startswith("tokenizer=None: ")
    assert "give tokenizer=bytes" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "prompt: give one: prompt=TEXT, or prompt_file=PATH"),
        (("prompt=",), "prompt: an empty text: there is nothing to go on from; give at least a character"),
        (("prompt_file=none.txt",), "prompt_file=none.txt: cannot be read (No such file or directory)"),
        (("prompt=a", "prompt_file=a.jsonl"), "prompt_file=a.jsonl: holds the prompts; leave prompt= out"),
        (("prompt=a", "temperature=0"), "temperature=0.0: must be positive and finite"),
        (("prompt=a", "temperature=1", "top_p=1.5"), "top_p=1.5: must lie in (0, 1]"),
        (("prompt=a", "tokenizer=./none"), "tokenizer=./none: no such folder; give bytes"),
        (("prompt=a", "mitigation.name=all"), "mitigation.name=all: only evaluate compares all; choose one"),
        (("prompt=a", "max_new_tokens=0"), "max_new_tokens=0: makes nothing; give save_state=PATH"),
        (("prompt=a", "state=none.state"), "state=none.state: no such file; make one with save_state=PATH"),
        (("prompt=a", "save_state=none/a.state"), "save_state=none/a.state: cannot be written (No such file"),
        (("prompt=a", "prompt=b", "batch_size=1", "save_state=x"), "save_state=x: 2 prompts in batches of 1"),
        (("prompt=a", "cuda_graph=true", "device=cpu"), "cuda_graph=True: needs a GPU"),
        (("prompt=a", "dtype=int8"), "dtype: "),
        (("prompt=a", "promptt=a"), "promptt: "),
    ],
)
def test_mistakes_are_told_in_one_line(
    capsys: Any, checkpoint: Path, arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(capsys, f"checkpoint={checkpoint}", *arguments).startswith(message)


def test_more_mistakes(capsys: Any, checkpoint: Path, tmp_path: Path) -> None:
    assert refusal(capsys, "prompt=a").startswith("checkpoint=: give a run directory")
    assert "no such checkpoint" in refusal(capsys, "prompt=a", f"checkpoint={tmp_path / 'none.ckpt'}")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('"fine"\n{"text": "a"}\n')
    message = refusal(capsys, f"checkpoint={checkpoint}", f"prompt_file={bad}")
    assert message.endswith('line 2 is neither a JSON text nor {"prompt": "..."}')
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"ab\xff")
    assert "not UTF-8 text (byte 2)" in refusal(capsys, f"checkpoint={checkpoint}", f"prompt_file={binary}")
    folder = tmp_path / "tokenizer"
    byte_level(folder)
    message = refusal(capsys, f"checkpoint={checkpoint}", "prompt=a", f"tokenizer={folder}")
    assert "token ids, the model of" in message


def test_rows_of_a_state_must_be_those_of_the_prompts(capsys: Any, checkpoint: Path, tmp_path: Path) -> None:
    state, document = tmp_path / "two.state", tmp_path / "a.txt"
    document.write_text("text")
    saved = ("max_new_tokens=0", f"save_state={state}")
    call(capsys, checkpoint, "prompt=ab", "prompt=c", *saved)
    given = (f"checkpoint={checkpoint}", f"state={state}")
    three = ("prompt=a", "prompt=b", "prompt=c")
    assert "of 2 rows, for 3 prompts" in refusal(capsys, *given, *three)
    assert "is read once for all prompts" in refusal(capsys, *given, *three[:2], f"prompt_file={document}")
    settings = ("temperature=1", "max_new_tokens=5")
    texts = [
        call(capsys, checkpoint, f"state={state}", "prompt=x", "prompt=y", *settings, f"batch_size={size}")
        for size in (1, 2)
    ]
    assert {*texts[0].splitlines()} == {*texts[1].splitlines()}


def test_a_state_is_looked_at_before_the_model_is_loaded(
    capsys: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, foreign = tmp_path / "two.state", tmp_path / "foreign.state"
    call(capsys, checkpoint, "prompt=ab", "prompt=c", "max_new_tokens=0", f"save_state={state}")
    save_file({"x": torch.zeros(2)}, foreign)
    (tmp_path / "text.state").write_text("no state")
    monkeypatch.setattr(command, "load_model", None)
    for file, message in (
        (tmp_path / "none.state", "no such file; make one with save_state=PATH"),
        (foreign, "no saved state of this version"),
        (tmp_path / "text.state", "truncated or damaged, or no saved state"),
        (state, "of 2 rows, for 3 prompts"),
    ):
        given = (f"checkpoint={checkpoint}", f"state={file}", "prompt=a", "prompt=b", "prompt=c")
        assert refusal(capsys, *given).startswith(f"state={file}: {message}")


def test_help_and_print_config(capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(f"  {name}=" in out for name in ("prompt", "top_p", "save_state", "mitigation.window"))
    with pytest.raises(SystemExit):
        main(["checkpoint=x", "prompt=${a", "print_config=true"])
    assert "- \\${a" in capsys.readouterr().out


def test_a_reader_that_goes_away_is_no_error(checkpoint: Path) -> None:
    """`generate ... | head`; and what the terminal cannot show ends nothing."""
    line = [sys.executable, "-m", "lightning_modules.generate", f"checkpoint={checkpoint}", "prompt=a"]
    line += ["temperature=1", "max_new_tokens=2000", "threads=1"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    pipe = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert pipe.stdout is not None
    assert pipe.stderr is not None
    assert len(pipe.stdout.read(5)) == 5
    pipe.stdout.close()
    errors = pipe.stderr.read().decode()
    assert pipe.wait(60) == 0, errors
    assert errors == ""
    pipe.stderr.close()


def test_prompts_that_are_no_text_and_lines_that_only_a_newline_ends(
    capsys: Any, checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('\ufeff"a\u2028b"\n{"prompt": "x\x85y"}\n', encoding="utf-8")
    out = call(capsys, checkpoint, f"prompt_file={file}", "max_new_tokens=1")
    assert [json.loads(line)["prompt"] for line in out.rstrip("\n").split("\n")] == [0, 1]
    file.write_text('"a\\ud800"')
    for given in (f"prompt_file={file}", "prompt=a\udcff"):
        error = refusal(capsys, f"checkpoint={checkpoint}", given)
        assert re.fullmatch(r"prompt=a.*: character 1 is not Unicode text; write it as UTF-8", error)


def test_an_output_that_cannot_be_written_is_told(checkpoint: Path, tmp_path: Path) -> None:
    """A full disk, and a reader that leaves before the state could be saved."""
    line = [sys.executable, "-m", "lightning_modules.generate", f"checkpoint={checkpoint}", "prompt=Hi"]
    kept = f"save_state={tmp_path}/kept.state"
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "standard output: cannot be written (No space left on device)" in done.stderr
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*line, kept], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert done.returncode == 2
    assert "kept.state: not written: standard output was closed" in done.stderr
    assert list(tmp_path.iterdir()) == []

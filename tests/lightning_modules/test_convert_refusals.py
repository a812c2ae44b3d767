"""What does not convert is named in one line, and nothing is left behind."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.checkpoints import load_model
from lightning_modules.convert import main
from tests.lightning_modules.layouts import CASES, config_of, write_hf, write_state_spaces

Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("error: ")
    return error


def poison(name: str, value: float) -> Change:
    def change(weights: dict[str, Tensor], config: dict[str, Any]) -> None:
        weights[name][1] = value

    return change


MIXER = "backbone.layers.1.mixer"
WRONG: dict[str, tuple[Change, str]] = {
    "missing": (lambda w, c: w.pop(f"{MIXER}.dt_bias"), f"has no parameter {MIXER}.dt_bias: "),
    "missing_more": (
        lambda w, c: [w.pop(f"{MIXER}.{name}") for name in ("D", "A_log")],
        f"has no parameter {MIXER}.A_log and 1 more",
    ),
    "unknown": (lambda w, c: w.update(x_proj=torch.zeros(2)), "holds x_proj, for which Mamba-2"),
    "shape": (
        lambda w, c: w.update({f"{MIXER}.D": torch.zeros(3)}),
        rf"{MIXER}.D has shape \(3,\), .* \(8,\)",
    ),
    "infinite_A_log": (
        poison(f"{MIXER}.A_log", -torch.inf),
        rf"{MIXER}.A_log is -inf in float16 at heads \[1\]",
    ),
    "nan": (poison(f"{MIXER}.norm.weight", torch.nan), f"{MIXER}.norm.weight is nan at 1 places, first 1"),
    "integers": (
        lambda w, c: w.update({f"{MIXER}.D": torch.ones(8, dtype=torch.int8)}),
        "is torch.int8, not",
    ),
    "untied": (lambda w, c: c.update(tie_embeddings=True), "differs from backbone.embedding.weight though"),
    "mamba_1": (lambda w, c: c.update(ssm_cfg={}), "ssm_cfg.layer=Mamba1: not Mamba-2"),
    "unknown_setting": (lambda w, c: c["ssm_cfg"].update(d_ssm2=1), "ssm_cfg.d_ssm2=1: unknown setting"),
    "fixed_setting": (lambda w, c: c.update(rms_norm=False), "rms_norm=False: our Mamba-2 has True"),
    "attention": (lambda w, c: c.update(attn_layer_idx=[3]), r"attn_layer_idx=\[3\]: our Mamba-2 has \[\]"),
    "no_size": (lambda w, c: c.pop("vocab_size"), "has no vocab_size"),
    "not_a_size": (lambda w, c: c.update(d_model="wide"), "config.json: .*wide"),
    "no_ssm_cfg": (lambda w, c: c.update(ssm_cfg=None), "ssm_cfg=None: must hold settings by name"),
    "no_multiple": (
        lambda w, c: c.update(pad_vocab_size_multiple=0),
        "pad_vocab_size_multiple=0: must be a whole number",
    ),
    "fp8": (
        lambda w, c: w.update({f"{MIXER}.D": torch.ones(8).to(torch.float8_e4m3fn)}),
        "float8_e4m3fn, not floating point of 16 bits",
    ),
    "sparse": (
        lambda w, c: w.update({f"{MIXER}.D": torch.ones(8).to_sparse()}),
        f"{MIXER}.D is sparse or without values",
    ),
    "number_as_name": (lambda w, c: w.update({5: torch.ones(8)}), "5 is no name of a parameter"),
    "vocabulary": (
        lambda w, c: c.update(vocab_size=50),
        r"embedding.weight has shape \(48, 32\), .* \(64, 32\)",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_state_spaces_checkpoint(
    change: Change, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(CASES["groups"] | {"tie_embeddings": False})
    weights = write_state_spaces(tmp_path / "theirs", config, torch.float16)
    file = tmp_path / "theirs" / "config.json"
    settings = json.loads(file.read_text())
    change(weights, settings)
    torch.save(weights, tmp_path / "theirs" / "pytorch_model.bin")
    file.write_text(json.dumps(settings))
    error = refused(capsys, f"source={tmp_path}/theirs", f"target={tmp_path}/ours")
    assert re.search(message, error), error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]
    with pytest.raises(ValueError, match=message):  # load_model says the same
        load_model(tmp_path / "theirs")


HF_WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "defaulted_size": ({"hidden_size": None}, "has no hidden_size: transformers would fill in another"),
    "bias": ({"use_bias": True}, "use_bias=True: our Mamba-2 has False"),
    "chunk": ({"chunk_size": None}, "chunk_size: Incompatible value 'None'"),
    "limit": ({"time_step_limit": [0.0, {"__float__": "x"}]}, "time_step_limit=.* is no number"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "has a quantization_config"),
    "quoted": ({"num_heads": "8"}, "num_heads='8': must be a whole number, without quotes"),
    "fraction": ({"state_size": 12.0}, r"state_size=12.0: must be a whole number"),
    "heads": ({"num_heads": 9}, "num_heads=9: expand .* is 8"),
    "other_model": ({"model_type": "mamba"}, "model_type=mamba: not Mamba-2 in a layout known here"),
    "vocabulary": ({"vocab_size": 40}, r"backbone.embeddings.weight has shape \(48, 32\), .* \(40, 32\)"),
}


@pytest.mark.parametrize(("settings", "message"), HF_WRONG.values(), ids=HF_WRONG.keys())
def test_a_wrong_transformers_checkpoint(
    settings: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_hf(tmp_path / "theirs", config_of(CASES["groups"]), torch.float32)
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    error = refused(capsys, f"source={tmp_path}/theirs", f"target={tmp_path}/ours")
    assert re.search(message, error), error


def test_a_padded_vocabulary_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_state_spaces(tmp_path / "theirs", config_of(CASES["groups"]), torch.float32, tokens=37)
    main([f"source={tmp_path}/theirs", f"target={tmp_path}/hf", "layout=hf"])
    said = capsys.readouterr().out
    assert "vocabulary: 37 tokens padded to 48 rows (pad_vocab_size_multiple=16): the last 11" in said
    assert "37 tokens padded to 48" in json.loads((tmp_path / "hf" / "parity.json").read_text())["notes"][0]
    assert load_model(tmp_path / "hf").config.vocab_size == 48


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights: dict[str, Any] = write_state_spaces(
        tmp_path / "theirs", config_of(CASES["groups"]), torch.float32
    )
    file = tmp_path / "theirs" / "pytorch_model.bin"
    torch.save(weights | {"bomb": Bomb(tmp_path / "ran")}, file)
    error = refused(capsys, f"source={tmp_path}/theirs", f"target={tmp_path}/ours")
    assert "holds more than tensors" in error
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    refused(capsys, f"source={tmp_path}/theirs", f"target={tmp_path}/ours")
    assert not (tmp_path / "ran").exists()


def test_damaged_and_incomplete_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, line = tmp_path / "theirs", [f"source={tmp_path}/theirs", f"target={tmp_path}/ours"]
    write_hf(source, config_of(CASES["deep"]), torch.float32, shard="8KB")
    shards = sorted(source.glob("*.safetensors"))
    kept = shards[1].read_bytes()
    shards[1].write_bytes(kept[:-100])
    assert f"{shards[1]}: truncated or damaged" in refused(capsys, *line)
    shards[1].unlink()
    assert f"names {shards[1].name}, which is not there: copy all shards" in refused(capsys, *line)
    shards[1].write_bytes(shards[2].read_bytes())
    assert "does not place there" in refused(capsys, *line)
    shutil.rmtree(source)
    assert "no such file or directory" in refused(capsys, *line)
    source.mkdir()
    (source / "config.json").write_text("{")
    assert "config.json: cannot be read" in refused(capsys, *line)


def test_targets_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hf(tmp_path / "theirs", config_of(CASES["groups"]), torch.float32)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    error = refused(capsys, f"source={tmp_path}/theirs", f"target={tmp_path}/taken")
    assert "exists and is never overwritten" in error
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    error = refused(capsys, f"source={tmp_path}/theirs", f"target={tmp_path}/new")
    assert "needs 64 MiB, 0 MiB are free" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken", "theirs"]
    for argument, message in (
        ("max_shard_size=big", "max_shard_size=big: must be a size"),
        ("layout=onnx", "layout"),
        ("evaluation=x.json", "only layout=hf writes"),
    ):
        assert message in refused(capsys, "source=a", "target=b", argument)


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    """`convert ... | true`: what is said before the work, of the padding, goes nowhere; the work is done."""
    write_state_spaces(tmp_path / "theirs", config_of(CASES["groups"]), torch.float32, tokens=37)
    line = [sys.executable, "-m", "lightning_modules.convert"]
    line += [f"source={tmp_path}/theirs", f"target={tmp_path}/ours", "parity_tokens=1"]
    read, write = os.pipe()
    os.close(read)
    root = Path(__file__).parents[2]
    done = subprocess.run(line, cwd=root, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "ours" / "parity.json").is_file()


def test_a_killed_conversion_leaves_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it compares: the next start clears what was left and succeeds."""
    from lightning_modules.conversion import run as conversion

    write_hf(tmp_path / "theirs", config_of(CASES["groups"]), torch.float32)
    arguments = [f"source={tmp_path}/theirs", f"target={tmp_path}/ours"]
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(conversion, "_compare", lambda *_: os._exit(9))
        main(arguments)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "ours").exists()
    assert (tmp_path / ".ours.converting" / "model.safetensors").is_file()
    main(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_another_model_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: logits of transformers that read another model."""
    from lightning_modules.conversion import parity

    write_hf(tmp_path / "theirs", config_of(CASES["groups"]), torch.float32)
    write_hf(tmp_path / "others", config_of(CASES["groups"]), torch.float32)
    read = parity.transformers_logits
    monkeypatch.setattr(parity, "transformers_logits", lambda _, ids: read(tmp_path / "others", ids))
    with pytest.raises(SystemExit):
        main([f"source={tmp_path}/theirs", f"target={tmp_path}/ours"])
    assert not (tmp_path / "ours").exists()


def test_weights_that_share_memory_and_are_transposed_convert(tmp_path: Path) -> None:
    config = config_of(CASES["groups"] | {"tie_embeddings": False})
    weights = write_state_spaces(tmp_path / "theirs", config, torch.float32)
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    weights[f"{MIXER}.in_proj.weight"] = weights[f"{MIXER}.in_proj.weight"].t().contiguous().t()
    torch.save(weights, tmp_path / "theirs" / "pytorch_model.bin")
    for layout in ("ours", "hf"):
        main([f"source={tmp_path}/theirs", f"target={tmp_path}/{layout}", f"layout={layout}"])


def test_a_full_disk_a_second_conversion_and_a_lost_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of them stays, directories made on the way included."""
    import fcntl
    import resource

    write_state_spaces(tmp_path / "theirs", config_of(CASES["groups"]), torch.float32)
    line = [f"source={tmp_path}/theirs", f"target={tmp_path}/new/place"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for layout in ("ours", "hf", "state-spaces"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
        try:
            error = refused(capsys, *line, f"layout={layout}")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert f"target={tmp_path}/new/place: cannot be written" in error
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    assert "tokenizer: copied from the source" in refused(capsys, *line, "layout=hf")
    assert "is a link" in refused(capsys, line[0], f"target={_link(tmp_path)}")
    assert "no such file or directory" in refused(capsys, f"source={'a' * 5000}", line[1])
    (tmp_path / ".busy.converting").mkdir()
    lock = os.open(tmp_path / ".busy.converting", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    error = refused(capsys, line[0], f"target={tmp_path}/busy")
    os.close(lock)
    assert "another conversion is writing it" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == [".busy.converting", "link", "theirs"]


def _link(folder: Path) -> Path:
    (folder / "link").symlink_to(folder)
    return folder / "link"

"""The command: what it leaves behind, what it refuses."""

import json
import re
import shlex
import subprocess
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conf.load import parse, to_dict
from conf.measure_schema import DiagnoseConfig
from conf.schema import TrainConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.checkpoints import save_model, write_checkpoint
from lightning_modules.diagnose import main
from lightning_modules.mlflow_store import connect

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

ROOT = Path(__file__).parents[2]
TINY = ("model.d_model=16", "model.d_state=8", "model.headdim=8", "model.chunk_size=16")
QUICK = ("length=512", "needle_prompts=4", "prompts=2")
UNTRACKED = "tracking.enabled=false"


def write_run(folder: Path, *overrides: str) -> Path:
    """A run directory with the checkpoint of an untrained model."""
    config = parse(TrainConfig, [*TINY, "data.train_length=128", *overrides])
    (folder / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    state = {f"model.{name}": value for name, value in Mamba2LM(config.model).state_dict().items()}
    contents = {"state_dict": state, "config": to_dict(config), "step": 7}
    write_checkpoint(contents, folder / "checkpoints" / "step=0000007.ckpt")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("trained") / "run")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.counts: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_leaves_a_described_diagnosis(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, store = tmp_path / "diagnosis", f"sqlite:///{tmp_path}/mlflow.db"
    mitigation = ("mitigation.name=forget_more", "mitigation.alpha_scale=0.99")
    arguments = [
        f"checkpoint={checkpoint}",
        f"run_dir={run_dir}",
        f"tracking.uri={store}",
        *QUICK,
        *mitigation,
    ]
    main(arguments)
    found, result = read_json(run_dir / "diagnosis.json"), read_json(run_dir / "result.json")
    assert (found["task"], found["train_length"], found["length"]) == ("passkey", 128, 512)
    assert found["prompt"] == {"name": "passkey", "text": "the passkey task's filler", "rows": 2}
    assert found["mitigation"]["alpha_scale"] == 0.99
    assert found["collapse"]["by"] == "recent needles"
    assert found["collapse"]["solved"] is False
    assert found["collapse_position"] is None
    assert found["thresholds"] == {
        **{"loss_ratio": 2.0, "solved": 0.9, "lost": 0.5, "chance": 0.95, "variance_ratio": 4.0},
        **{"retention": 0.99, "channel_share": 0.5, "top_channels": 0.01},
    }
    assert [row["length"] for row in found["needles"]["recent"]] == [128, 256, 512]
    assert [(row["layer"], row["head"]) for row in found["heads"]] == [
        (i, h) for i in (0, 1) for h in range(4)
    ]
    for name in ("collapsed_heads", "over_retaining_heads", "outlier_channels"):
        assert all({"layer", "head"} <= row.keys() for row in found[name])
    assert found["remembrance"]["length"] == 512
    # No head can keep more than alpha_scale allows: a mitigation is measured, too.
    assert all(row["retention"] <= 0.99**127 for row in found["heads"])
    assert (result["status"], result["command"]) == ("completed", "diagnose")
    assert {"collapse/position", "collapse/loss_ratio", "collapse/max_head_rms"} <= result["metrics"].keys()
    assert all(isinstance(value, float) for value in result["metrics"].values())
    with np.load(run_dir / "measures.npz") as measures:
        shape = (len(measures["positions"]), 2, 4)
        assert all(measures[name].shape == shape for name in measures.files if name != "positions")
        assert measures["rms"].max() == result["metrics"]["collapse/max_head_rms"]

    text = (run_dir / "diagnosis.html").read_text()
    page = Page(text)
    assert page.open == []
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"https?:|@import|url\(", text)
    figures = {path.name for path in (run_dir / "figures").iterdir()}
    assert page.counts["img"] == len(page.links) == len(figures) == 10
    assert page.counts["polyline"] == 2 * 8  # every head's RMS and retention
    for sentence in found["findings"]:
        assert escape(sentence) in text
    assert "forget_more (alpha_scale 0.99)" in text
    assert found["command"] in text
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert found["findings"][0] in printed
    assert str(run_dir / "diagnosis.html") in printed

    client = connect(store)
    run = client.get_run(result["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["collapse/max_head_rms"] == result["metrics"]["collapse/max_head_rms"]
    assert run.data.tags["command"] == "diagnose"
    logged = {Path(file.path).name for file in client.list_artifacts(run.info.run_id, "figures")}
    assert logged == figures
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert names >= {"diagnosis.json", "diagnosis.html", "measures.npz", "config.yaml"}

    before = (run_dir / "result.json").read_bytes()
    main(arguments)
    assert "holds this diagnosis already" in capsys.readouterr().out
    assert (run_dir / "result.json").read_bytes() == before


def test_the_command_on_the_page_repeats_the_diagnosis(checkpoint: Path, tmp_path: Path) -> None:
    settings = [
        *QUICK,
        "prompt=sentence",
        'sentence="It\'s a test. "',
        "remembrance=0",
        "thresholds.lost=0.4",
    ]
    main([f"checkpoint={checkpoint}", f"run_dir={tmp_path / 'first'}", UNTRACKED, "threads=1", *settings])
    first = read_json(tmp_path / "first" / "diagnosis.json")
    python, dash_m, module, *arguments = shlex.split(first["command"])
    assert (python, dash_m, module) == ("python", "-m", "lightning_modules.diagnose")
    config = parse(DiagnoseConfig, arguments)
    assert (config.sentence, config.thresholds.lost, config.length) == ("It's a test. ", 0.4, 512)
    assert first["prompt"]["name"] == "sentence"
    assert first["remembrance"] is None
    main([*arguments, f"run_dir={tmp_path / 'again'}", UNTRACKED])
    assert read_json(tmp_path / "again" / "diagnosis.json") == first


def test_documents_are_read_beyond_their_ends(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        (texts / f"{i}.txt").write_text(f"Text number {i}. " * 40)
    documents = ("data.name=documents", f"data.documents.source={texts}", "data.documents.val_fraction=0.5")
    run = write_run(tmp_path / "run", *documents)
    main([f"checkpoint={run}", f"run_dir={tmp_path / 'out'}", UNTRACKED, *QUICK])
    found = read_json(tmp_path / "out" / "diagnosis.json")
    assert found["prompt"]["name"] == "documents"
    assert found["needles"] is None
    assert found["collapse"]["by"] == "loss"
    assert found["collapse"]["solved"] is False  # it has learnt nothing
    assert found["findings"][0].startswith("Unsolved")
    assert (tmp_path / "out" / "figures" / "loss_by_position.png").is_file()
    with pytest.raises(SystemExit):
        main([f"checkpoint={run}", f"run_dir={tmp_path / 'long'}", UNTRACKED, "length=1000000"])


def test_states_that_stop_being_finite_beyond_training_are_found(tmp_path: Path) -> None:
    """One head grows by a factor of exp(0.5) a token until fp32 ends."""
    config = parse(TrainConfig, [*TINY, "data.name=documents", "data.train_length=64"])
    model = Mamba2LM(config.model)
    mixer = model.backbone.layers[1].mixer
    with torch.no_grad():
        mixer.in_proj.weight[-4:] = 0.0
        mixer.dt_bias.fill_(0.5413)  # dt = 1
        mixer.A_log.fill_(0.0)
    original = mixer.forward

    def exploding(*arguments: Any) -> Any:
        out, state = original(*arguments)
        state.ssm[:, 3] *= float("inf") if int(arguments[3][0]) >= 200 else 1.0
        return out, state

    save_model(model, tmp_path / "model", config)
    import lightning_modules.diagnosis.run as run

    def load(*arguments: Any, **options: Any) -> Mamba2LM:
        model.backbone.layers[1].mixer.forward = exploding
        return model.eval()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_subject", load)
        main([f"checkpoint={tmp_path / 'model'}", f"run_dir={tmp_path / 'out'}", UNTRACKED, "prompt=newline"])
    found = read_json(tmp_path / "out" / "diagnosis.json")
    assert (found["non_finite"]["layer"], found["non_finite"]["head"]) == (1, 3)
    assert 200 <= found["non_finite"]["position"] <= 400
    assert f"layer 1, head 3 at token {found['non_finite']['position']}" in found["findings"][1]
    assert (tmp_path / "out" / "diagnosis.html").is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint=nowhere"], "no such checkpoint"),
        (["checkpoint=CUT"], "truncated or damaged"),
        (["length=0"], "length=0: must be at least 1"),
        (["length=100"], "length=100: must exceed the training length, 128"),
        (["length=128"], "length=128: must exceed the training length, 128"),
        (["stride=500"], "stride=500: no state beyond the training length"),
        (["stride=0"], "stride=0: must be at least 1"),
        (["bucket=500"], "bucket=500: exceeds the training length, 128"),
        (["prompts=0"], "prompts=0: must be at least 1"),
        (["remembrance=3"], "remembrance=3: must be 0, or at least 8"),
        (["prompt=sentence", "sentence=''"], "sentence='': give a text"),
        (["thresholds.lost=0.95"], "thresholds.lost=0.95: must be below solved=0.9"),
        (["thresholds.variance_ratio=0.5"], "thresholds.variance_ratio=0.5: must be at least 1"),
        (["thresholds.retention=1.5"], "thresholds.retention=1.5: must lie in (0, 1]"),
        (["mitigation.name=all"], "mitigation.name=all: a diagnosis is of one"),
        (["run_dir=RUN"], "belongs to a training run"),
        (["checkpoint=NAN"], "backbone.layers.0.mixer.D is NaN or infinite"),
        (["checkpoint=HUGE"], "the state of layer 1, head 0 is NaN or infinite at token 4, within"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_users_mistake_is_answered_in_one_line(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    message: str,
) -> None:
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes((checkpoint / "checkpoints" / "step=0000007.ckpt").read_bytes()[:5000])
    places = {"RUN": checkpoint, "CUT": cut, "NAN": tmp_path / "nan", "HUGE": tmp_path / "huge"}
    config = parse(TrainConfig, [*TINY, "data.train_length=128"])
    for name in ("NAN", "HUGE"):
        model = Mamba2LM(config.model)
        with torch.no_grad():
            if name == "NAN":
                model.backbone.layers[0].mixer.D[1] = torch.nan
            else:
                model.backbone.layers[1].mixer.conv1d.bias.fill_(1e20)
        save_model(model, places[name], config)
    for name, path in places.items():
        overrides = [override.replace(name, str(path)) for override in overrides]
    with pytest.raises(SystemExit) as stop:
        main([f"checkpoint={checkpoint}", f"run_dir={tmp_path / 'out'}", UNTRACKED, *QUICK, *overrides])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "result.json").exists()


def test_a_wrong_setting_is_answered_before_torch() -> None:
    program = (
        "import sys\nfrom lightning_modules.diagnose import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'lightning', 'mlflow', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    for argument, fragment in (("--help", "thresholds.variance_ratio=4.0"), ("lenght=5", "length")):
        done = subprocess.run(
            [sys.executable, "-c", program, argument], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert fragment in done.stdout + done.stderr

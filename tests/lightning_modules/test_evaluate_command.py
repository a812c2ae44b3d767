"""The command: what it leaves behind, what it refuses, how it ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.load import parse, to_dict
from conf.measure_schema import EvaluateConfig
from conf.schema import TrainConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.checkpoints import save_model, write_checkpoint
from lightning_modules.evaluate import main
from lightning_modules.evaluation import suites
from lightning_modules.mlflow_store import connect

pytestmark = [
    # MLflow's own queries, on SQLAlchemy 2.1, and its log_table, on pandas 3.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
    pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes"),
]

ROOT = Path(__file__).parents[2]
TINY = (
    "model.d_model=16",
    "model.d_state=8",
    "model.headdim=8",
    "model.chunk_size=16",
    "data.train_length=128",
)
QUICK = (
    "passkey.lengths=[256,128]",
    "passkey.prompts=4",
    "passkey.depths=2",
    "passkey.prompts_per_depth=2",
    "loss.length=300",
    "loss.prompts=2",
)
UNTRACKED = "tracking.enabled=false"


def write_run(folder: Path, *overrides: str, poison: bool = False) -> Path:
    """A run directory with the checkpoint of an untrained model; with `poison`, its every output is NaN."""
    config = parse(TrainConfig, [*TINY, *overrides])
    (folder / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    state = {f"model.{name}": value for name, value in Mamba2LM(config.model).state_dict().items()}
    if poison:
        state["model.backbone.norm_f.weight"].fill_(torch.nan)
    contents = {"state_dict": state, "config": to_dict(config), "step": 7}
    write_checkpoint(contents, folder / "checkpoints" / "step=0000007.ckpt")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "mitigation",
    [
        ("name=state_norm", "max_norm=0.01", "every=16"),
        ("name=sliding_window", "window=50"),
        ("name=hard_reset", "every=100"),
    ],
    ids=["state_norm", "sliding_window", "hard_reset"],
)
def test_evaluates_under_any_mitigation(
    checkpoint: Path, tmp_path: Path, mitigation: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"mitigation.{setting}" for setting in mitigation]
    main([f"checkpoint={checkpoint}", f"run_dir={tmp_path}", UNTRACKED, *QUICK, *settings])
    evaluation = read_json(tmp_path / "evaluation.json")
    assert f"name={evaluation['mitigation']['name']}" == mitigation[0]
    assert all(value is not None for value in evaluation["loss"]["loss"])
    (name, *shown) = (setting.split("=")[1] for setting in mitigation)
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert f"{name} (" in printed
    assert all(value in printed for value in shown)


def test_leaves_a_described_evaluation(
    checkpoint: Path, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "evaluation"
    mitigation = ("mitigation.name=forget_more", "mitigation.alpha_scale=0.99")
    main([f"checkpoint={checkpoint}", f"run_dir={run_dir}", f"tracking.uri={store}", *QUICK, *mitigation])

    evaluation, result = read_json(run_dir / "evaluation.json"), read_json(run_dir / "result.json")
    assert evaluation["train_length"] == 128
    assert evaluation["model"]["d_state"] == 8
    assert evaluation["mitigation"]["alpha_scale"] == 0.99
    passkey = evaluation["passkey"]
    assert [(row["length"], row["prompts"]) for row in passkey["recent"]] == [(128, 4), (256, 4)]
    assert [(row["length"], row["depth"], row["prompts"]) for row in passkey["recall"]] == [
        (128, 0.25, 2),
        (128, 0.75, 2),
        (256, 0.25, 2),
        (256, 0.75, 2),
    ]
    assert [(row["length"], row["prompts"]) for row in passkey["recall_by_length"]] == [(128, 4), (256, 4)]
    for row in (*passkey["recent"], *passkey["recall"], *passkey["recall_by_length"]):
        assert 0 <= row["exact_low"] <= row["exact"] <= row["exact_high"] <= 1
        assert 0 <= row["digits_low"] <= row["digits"] <= row["digits_high"] <= 1
        assert row["non_finite"] is False
    assert evaluation["loss"]["bucket"] == 32
    assert len(evaluation["loss"]["loss"]) == len(evaluation["loss"]["position"]) == 10
    assert evaluation["conclusion"]["solved"] is False
    assert (result["status"], result["command"]) == ("completed", "evaluate")
    assert result["metrics"]["passkey/recent_exact_at_256"] == passkey["recent"][1]["exact"]
    assert all(isinstance(value, float) for value in result["metrics"].values())
    assert parse(EvaluateConfig, [str(run_dir / "config.yaml")]).mitigation.alpha_scale == 0.99
    figures = {"accuracy_by_length.png", "loss_by_position.png", "passkey_heatmap.png"}
    assert {path.name for path in (run_dir / "figures").iterdir()} == figures
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert "Unsolved" in printed
    assert str(run_dir / "evaluation.json") in printed

    client = connect(store)
    run = client.get_run(result["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["passkey/recall_exact_at_128"] == passkey["recall_by_length"][0]["exact"]
    assert run.data.tags["command"] == "evaluate"
    assert run.data.tags["checkpoint"] == str(checkpoint)
    assert run.data.tags["collapse"] == "False"
    assert (run.data.params["model.d_state"], run.data.params["data.train_length"]) == ("8", "128")
    curve = client.get_metric_history(run.info.run_id, "passkey/recent_exact")
    assert [point.step for point in curve] == [128, 256]
    assert {Path(file.path).name for file in client.list_artifacts(run.info.run_id, "figures")} == figures
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert names >= {"evaluation.json", "config.yaml", "accuracy_by_length.json"}


def test_belongs_to_the_study_and_reads_killed_when_terminated(
    checkpoint: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites.PasskeySuite, "run", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    parent = "0123456789abcdef0123456789abcdef"
    run_dir = checkpoint / "evaluation"
    owned = (f"run_dir={run_dir}", f"tracking.uri={store}", f"tracking.parent_run_id='{parent}'")
    with pytest.raises(SystemExit) as stop:
        main([f"checkpoint={checkpoint}", *owned, *QUICK])
    assert stop.value.code == 128 + signal.SIGTERM
    assert not (run_dir / "result.json").exists()
    run = connect(store).get_run(read_json(run_dir / "tracking.json")["run_id"])
    assert run.info.status == "KILLED"
    assert run.info.run_name == "run-evaluation"
    assert run.data.tags["mlflow.parentRunId"] == parent


def test_the_same_command_again_finds_its_result_and_another_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [f"checkpoint={checkpoint}", f"run_dir={tmp_path}", UNTRACKED, *QUICK]
    main(command)
    first = (tmp_path / "result.json").read_text()
    main([*command, "segment=64"])
    assert "holds this evaluation already" in capsys.readouterr().out
    assert (tmp_path / "result.json").read_text() == first
    with pytest.raises(SystemExit):
        main([*command, "seed=2"])
    assert "holds another evaluation" in capsys.readouterr().err


def test_without_run_dir_every_evaluation_gets_a_new_one(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        main(
            [
                f"checkpoint={checkpoint / 'checkpoints' / 'step=0000007.ckpt'}",
                UNTRACKED,
                "suites=[loss]",
                *QUICK,
            ]
        )
    made = sorted(path.name for path in Path("runs").iterdir())
    assert len(made) == 2
    assert all(name.startswith("evaluate-run-") for name in made)


def test_a_saved_model_is_evaluated_like_its_run(checkpoint: Path, tmp_path: Path) -> None:
    from lightning_modules.checkpoints import load_config, load_model

    save_model(load_model(checkpoint), tmp_path / "saved", load_config(checkpoint))
    found = []
    for path, name in ((checkpoint, "a"), (tmp_path / "saved", "b")):
        main([f"checkpoint={path}", f"run_dir={tmp_path / name}", UNTRACKED, *QUICK])
        evaluation = read_json(tmp_path / name / "evaluation.json")
        found.append((evaluation["passkey"], evaluation["loss"]))
    assert found[0] == found[1]


def test_non_finite_outputs_are_named_and_count_as_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", poison=True)
    mitigation = ("mitigation.name=delta_scale", "mitigation.delta_scale=0.5")
    main([f"checkpoint={run}", f"run_dir={tmp_path}", UNTRACKED, *QUICK, *mitigation])
    error = capsys.readouterr().err
    assert error.count("\n") == 3
    assert "NaN or infinity in passkey prompts of 256 tokens, mitigation {'name': 'delta_scale'" in error
    evaluation = read_json(tmp_path / "evaluation.json")
    assert evaluation["passkey"]["recent"][1]["non_finite"] is True
    assert evaluation["passkey"]["recent"][1]["exact"] == 0
    assert evaluation["conclusion"]["solved"] is False
    assert set(evaluation["loss"]["loss"]) == {None}
    assert (tmp_path / "figures" / "loss_by_position.png").is_file()


def test_a_documents_checkpoint_is_measured_on_held_out_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from datasets import config as datasets_config

    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        (texts / f"{i}.txt").write_text(f"Text number {i}. " * 30)
    documents = ("data.name=documents", f"data.documents.source={texts}", "data.documents.val_fraction=0.3")
    run = write_run(tmp_path / "run", *documents)
    main([f"checkpoint={run}", f"run_dir={tmp_path / 'out'}", UNTRACKED, "suites=[loss]", *QUICK])
    loss = read_json(tmp_path / "out" / "evaluation.json")["loss"]
    assert loss["text"] == "held-out documents"
    assert loss["length"] == 300
    assert all(
        3 < value < 8 for value in loss["loss"]
    )  # near log 256, the loss of a model that knows nothing
    assert 2 < loss["unigram"] < 3, "fewer letters than 256, and not as likely"
    assert all(0 < error < 1 for error in loss["error"])
    bounded = [argument for argument in QUICK if not argument.startswith("loss.length")]
    bounded += ["loss.max_length=280", "suites=[loss]", f"run_dir={tmp_path / 'bounded'}"]
    main([f"checkpoint={run}", UNTRACKED, *bounded])
    assert read_json(tmp_path / "bounded" / "evaluation.json")["loss"]["length"] == 280
    with pytest.raises(SystemExit):
        main([f"checkpoint={run}", f"run_dir={tmp_path / 'long'}", UNTRACKED, *QUICK, "loss.length=1000000"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint=nowhere"], "no such checkpoint"),
        (["checkpoint=CUT"], "truncated or damaged"),
        (["passkey.lengths=[64]"], "a passkey prompt needs at least"),
        (["passkey.recent_window=500"], "must lie between"),
        (["passkey.recent_window=20"], "must lie between"),
        (["loss.bucket=1000"], "exceeds 128, the shorter of"),
        (["device=cuda"], "no CUDA device"),
        (["run_dir=RUN"], "belongs to a training run"),
        (["run_dir=FILE/below"], "cannot be written"),
        (["tracking.enabled=true", "tracking.uri=sqlite:///FILE/below/mlflow.db"], "tracking.uri"),
        (["checkpoint=SHORT"], "the training length=64"),
        (["checkpoint=VOCAB"], "its tokenizer"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_users_mistake_is_answered_in_one_line(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device := "device=cuda" in overrides:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "file"
    file.write_text("text")
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes((checkpoint / "checkpoints" / "step=0000007.ckpt").read_bytes()[:5000])
    places = {"RUN": checkpoint, "FILE": file, "CUT": cut}
    if overrides == ["checkpoint=SHORT"]:
        places["SHORT"] = write_run(tmp_path / "short", "data.name=documents", "data.train_length=64")
    if overrides == ["checkpoint=VOCAB"]:
        places["VOCAB"] = write_run(tmp_path / "vocab", "data.tokenizer=wide", "model.vocab_size=100")
        from lightning_modules import measuring

        monkeypatch.setattr(measuring, "load_tokenizer", lambda name: type("T", (), {"vocab_size": 101}))
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
    assert not device or not (tmp_path / "out").exists()


def test_a_wrong_setting_is_answered_before_torch_and_nothing_imports_lightning() -> None:
    program = """if True:
        import sys
        from lightning_modules.evaluate import main
        try:
            main(["checkpoint=x", "segmnt=1"])
        except SystemExit:
            assert "torch" not in sys.modules
        import lightning_modules.evaluation.run
        assert "torch" in sys.modules
        heavy = {"lightning", "pytorch_lightning", "mlflow", "transformers", "datasets"} & set(sys.modules)
        assert not heavy, heavy
    """
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "segment" in done.stderr

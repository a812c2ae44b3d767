"""Every shipped config loads; every mistake is answered at once, in one line, without importing torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conf.load import flatten, from_dict, parse, to_dict, to_yaml
from conf.schema import TrainConfig

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(ROOT.glob("conf/train/*.yaml"))
LENGTHS = sorted(ROOT.glob("conf/train/length/*.yaml"))


def test_configs_are_shipped() -> None:
    assert {"demo", "smoke", "documents"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = parse(TrainConfig, [str(path)])
    copy = tmp_path / "config.yaml"
    copy.write_text(to_yaml(config))
    assert parse(TrainConfig, [str(copy)]) == config
    assert from_dict(TrainConfig, to_dict(config)) == config


@pytest.mark.parametrize("path", LENGTHS, ids=lambda path: path.stem)
def test_every_length_goes_with_every_size(path: Path) -> None:
    for size in SHIPPED:
        if size.stem.startswith("mamba2-"):
            config = parse(TrainConfig, [str(size), str(path)])
            tokens = config.data.train_length * config.data.batch_size
            assert tokens == max(2**19, config.data.train_length)


def test_later_sources_win(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 1\nmodel: {d_state: 32}\n")
    (tmp_path / "b.yaml").write_text("seed: 2\n")
    config = parse(TrainConfig, [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "optim.lr=1e-4"])
    assert (config.seed, config.model.d_state, config.optim.lr) == (2, 32, 1e-4)
    assert flatten(config)["optim.lr"] == 1e-4


MISTAKES = {
    "model.d_stat=32": ["d_stat", "d_state"],  # a typo gets a suggestion
    "model.d_state=large": ["model.d_state", "large"],
    "model.d_state=2.5": ["model.d_state", "2.5"],
    "data.name=pile": ["data.name", "pile"],
    "model.headdim=48": ["model.headdim=48", "divide", "256"],
    "model.n_groups=3": ["model.n_groups=3", "divide", "8"],
    "model.chunk_size=48": ["model.chunk_size=48", "power of two"],
    "model.chunk_size=8": ["model.chunk_size=8", "16"],
    "data.train_length=0": ["data.train_length=0", "at least 1"],
    "data.train_length=99": ["data.train_length=99", "at least 100 tokens", "longer"],
    "data={curriculum_length: 64, curriculum_steps: 9}": ["data.curriculum_length=64", "at least 100 tokens"],
    "data={train_length: 190, passkey: {opening: true}}": ["data.train_length=190", "opening=false"],
    "data.batch_size=0": ["data.batch_size=0", "at least 1"],
    "trainer.max_steps=0": ["trainer.max_steps=0", "at least 1"],
    "trainer.accumulate=5": ["data.batch_size=32", "multiple of", "5"],
    "optim.lr=0": ["optim.lr=0", "positive"],
    "optim.lr=nan": ["optim.lr=nan", "positive"],
    "model.vocab_size=100": ["model.vocab_size=100", "256"],
    "mitigation.alpha_scale=0.9": ["mitigation.alpha_scale=0.9", "mitigation.name=forget_more"],
    "mitigation.window=5": ["mitigation.window=5", "mitigation.name=sliding_window"],
    "mitigation.name=sliding_window": ["mitigation.window=None", "sliding_window needs it"],
    "mitigation={name: hard_reset, every: 0}": ["mitigation.every=0", "at least 1"],
    "mitigation={name: hard_reset, every: 2, max_norm: 1}": [
        "mitigation.max_norm=1.0",
        "belongs to state_norm",
    ],
    "mitigation={name: state_norm, every: 2, max_norm: 0}": ["mitigation.max_norm=0.0", "positive"],
    "initial_state.name=pased": ["initial_state.name", "pased"],
    "initial_state.reset_probability=1.5": ["initial_state.reset_probability=1.5", "[0, 1]"],
    "initial_state.reset_probability=-0.1": ["initial_state.reset_probability=-0.1", "[0, 1]"],
    "initial_state.bptt_segments=0": ["initial_state.bptt_segments=0", "at least 1"],
    "initial_state.bptt_segments=2": ["initial_state.bptt_segments=2", "initial_state.name=carried"],
    "initial_state.std=0.1": ["initial_state.std=0.1", "initial_state.name=noise"],
    "initial_state.name=noise": ["initial_state.std=None", "noise needs it"],
    "initial_state={name: noise, std: 0}": ["initial_state.std=0", "positive"],
    "data.curriculum_steps=5": ["data.curriculum_steps=5", "data.curriculum_length"],
    "data.curriculum_length=100": ["data.curriculum_length=100", "divide"],
    "data.documents.min_tokens=0": ["data.documents.min_tokens=0", "at least 1"],
    "data.documents={min_tokens: 9, max_document_tokens: 8}": ["max_document_tokens=8", "no document"],
    "data.documents={streaming: true, deduplicate: true}": ["streaming=true", "deduplicate"],
    "data.documents={streaming: true, max_tokens: 9}": ["streaming=true", "max_tokens"],
    "data={name: documents, num_workers: 2, documents: {streaming: true}}": ["num_workers=2", "in order"],
    "data.documents.mixture=[{source: a, weight: 0}]": ["weights=[0.0]", "sum to nothing"],
    "data.documents.mixture=[{source: a, weight: -1}]": ["weights=[-1.0]", "at least 0"],
    "data.documents.mixture=[{source: a, weight: 0.1234567}, {source: b}]": ["11,234,567 rows", "round"],
    "data.documents.mixture=[{sorce: a}]": ["sorce", "Did you mean"],
    "data.documents={source: x, mixture: [{source: a}]}": ["data.documents.source=x", "mixture"],
    "data.documents={layout: consecutive, mixture: [{source: a}]}": ["layout=consecutive", "packed"],
    "--seed=1": ["--seed=1", "without dashes"],
    "seed": ["seed", "key=value"],
    "missing.yaml": ["missing.yaml", "no such config file"],
}


@pytest.mark.parametrize(("argument", "fragments"), MISTAKES.items(), ids=MISTAKES.keys())
def test_a_mistake_is_named_in_one_line(argument: str, fragments: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        parse(TrainConfig, [argument])
    for fragment in fragments:
        assert fragment in str(caught.value)


CONSECUTIVE = {"data.name": "documents", "data.documents.layout": "consecutive"}


@pytest.mark.parametrize(
    ("name", "settings", "fragment"),
    [
        ("carried", {"data.name": "documents"}, "data.documents.layout=consecutive"),
        (
            "carried",
            {**CONSECUTIVE, "data.curriculum_length": 128, "data.curriculum_steps": 5},
            "data.curriculum_steps=5",
        ),
        ("passed", {**CONSECUTIVE, "data.batch_size": 4, "trainer.accumulate": 4}, "continues itself"),
        ("fitted_noise", {"mitigation.name": "sliding_window", "mitigation.window": 9}, "sliding_window"),
    ],
)
def test_an_initial_state_that_does_not_suit_the_run(name: str, settings: dict, fragment: str) -> None:
    with pytest.raises(ValueError, match=rf"\Ainitial_state.name={name}: [^\n]*{fragment}[^\n]*\Z"):
        parse(TrainConfig, [{"initial_state.name": name, **settings}])
    parse(TrainConfig, [settings])


def test_bad_yaml_is_named_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("model: {d_state: 32\nseed: [")
    with pytest.raises(ValueError, match=r"\A[^\n]*bad.yaml[^\n]*not valid YAML[^\n]*\Z"):
        parse(TrainConfig, [str(file)])


def processor_seconds() -> float:
    """Of all processes started here so far: not the clock's, which depend on what else is running."""
    used = os.times()
    return used.children_user + used.children_system


@pytest.mark.parametrize(
    ("arguments", "status", "stream", "fragment"),
    [
        (["--help"], 0, "stdout", "trainer.max_steps=1000"),
        (["print_config=true"], 0, "stdout", "max_steps: 1000"),
        (["model.headdim=48"], 2, "stderr", "error: model.headdim=48: must divide"),
        (["model.d_stat=48"], 2, "stderr", "error: "),
        (
            ["data.train_length=99"],
            2,
            "stderr",
            "error: data.train_length=99: a passkey prompt needs at least",
        ),
    ],
    ids=["help", "print_config", "shape", "typo", "passkey"],
)
def test_the_command_answers_within_a_second(
    arguments: list[str], status: int, stream: str, fragment: str
) -> None:
    begin = processor_seconds()
    done = subprocess.run(
        [sys.executable, "-m", "lightning_modules.train", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    seconds = processor_seconds() - begin
    assert done.returncode == status
    assert fragment in getattr(done, stream)
    if status:
        assert len(done.stderr.splitlines()) == 1
    assert seconds < 1.0


@pytest.mark.parametrize("arguments", [["--help"], ["model.headdim=48"], ["data.train_length=99"]], ids=str)
def test_the_command_answers_without_torch(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom lightning_modules.train import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'lightning', 'mlflow', 'numpy', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

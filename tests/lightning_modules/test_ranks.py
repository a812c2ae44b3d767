"""Two gloo processes train as one does, each with its own rows' states, and one continues what two began."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lightning_modules.checkpoints import checkpoint_path
from tests.lightning_modules.launcher import train, train_on_ranks
from tests.lightning_modules.test_resume import TIMINGS, assert_equal

SETTINGS = [
    *("model.d_model=32", "model.n_layers=2", "model.d_state=16", "model.headdim=16", "model.chunk_size=32"),
    *("data.name=documents", "data.documents.layout=consecutive", "data.documents.max_tokens=200000"),
    *("data.train_length=48", "data.batch_size=8", "data.val_sequences=6", "optim.warmup_steps=2"),
    *("trainer.max_steps=6", "trainer.threads=1", "trainer.accumulate=2"),
    *("trainer.log_every=1", "trainer.val_every=3", "trainer.checkpoint_every=3", "tracking.enabled=false"),
]
KINDS = {
    "carried": ["initial_state.bptt_segments=2", "initial_state.reset_probability=0.2"],
    "fitted_noise": ["initial_state.reset_probability=0.2"],
}


def train_on_two(run_dir: Path, argv: list[str]) -> None:
    output = run_dir.parent / "two.txt"
    assert train_on_ranks(2, [*argv, f"run_dir={run_dir}"], output) == [0, 0], output.read_text()


def contents(run_dir: Path, step: int) -> dict:
    return torch.load(checkpoint_path(run_dir / "checkpoints", step), weights_only=True)


def metrics(run_dir: Path) -> list[dict]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record["metrics"].items() if k not in TIMINGS} for record in records]


def assert_close(a: object, b: object) -> None:
    """Nested tensors and numbers: equal but for the rounding of a sum over ranks."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5)
    elif isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys()
        for key in a:
            assert_close(a[key], b[key])
    elif isinstance(a, list):
        assert isinstance(b, list)
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_close(x, y)
    else:
        assert a == pytest.approx(b, rel=1e-4)


def cut_off(whole: Path, copy: Path) -> None:
    """A copy of a finished run that has lost what came after its first checkpoint."""
    shutil.copytree(whole, copy)
    checkpoint_path(copy / "checkpoints", 6).unlink()
    (copy / "result.json").unlink()


def test_ranks_that_see_different_checkpoints_are_refused(tmp_path: Path) -> None:
    train_on_two(tmp_path / "whole", [*SETTINGS, "trainer.keep_last=5"])
    cut_off(tmp_path / "whole", tmp_path / "cut")
    run_dirs = [f"run_dir={tmp_path}/{name}" for name in ("whole", "cut")]
    (tmp_path / "whole" / "result.json").unlink()
    output = tmp_path / "output.txt"
    assert 1 in train_on_ranks(2, [*SETTINGS, "trainer.max_steps=6"], output, own=[[d] for d in run_dirs])
    assert "error: " in output.read_text()
    assert "its ranks would go on from steps 3 to 6" in output.read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_as_one(tmp_path: Path, kind: str) -> None:
    one, two, mixed = tmp_path / "one", tmp_path / "two", tmp_path / "mixed"
    argv = [*SETTINGS, f"initial_state.name={kind}", *KINDS[kind]]
    assert train([*argv, f"run_dir={one}"], tmp_path / "output.txt") == 0
    train_on_two(two, argv)
    cut_off(two, mixed)
    assert train([*argv, f"run_dir={mixed}"], tmp_path / "output.txt") == 0
    for part in ("state_dict", "initial_state"):
        expected = contents(one, 6)[part]
        for run_dir in (two, mixed):
            assert_close(expected, contents(run_dir, 6)[part])
        assert_close(contents(one, 3)[part], contents(two, 3)[part])
    assert_close(metrics(one), metrics(two))


def test_two_ranks_resume_bit_identical(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    argv = [*SETTINGS, "initial_state.name=passed", "initial_state.reset_probability=0.2"]
    train_on_two(whole, argv)
    cut_off(whole, cut)
    train_on_two(cut, argv)
    for part in ("state_dict", "optimizer_states", "initial_state"):
        assert_equal(contents(whole, 6)[part], contents(cut, 6)[part], part)

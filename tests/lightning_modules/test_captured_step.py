"""On a GPU: steps replayed as graphs train like the steps that Lightning takes there."""

import json
from pathlib import Path

import pytest
import torch

from lightning_modules.checkpoints import read_weights
from lightning_modules.run_dir import open_run_dir
from lightning_modules.side_by_side import Lane, train_side_by_side
from lightning_modules.train import train
from tests.lightning_modules.test_side_by_side import KINDS, config_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_runs_on_their_own_streams_equal_their_lonely_twins(tmp_path: Path) -> None:
    """A curriculum's border, states passed on, validation between steps; equal but for rounding."""
    configs = {kind: config_of(kind, "trainer.accelerator=cuda") for kind in KINDS}
    for kind, config in configs.items():
        train(tmp_path / "alone" / kind, config)
    runs = [open_run_dir(tmp_path / "beside" / kind, config) for kind, config in configs.items()]
    assert train_side_by_side(runs) == {}
    for kind in KINDS:
        folders = [tmp_path / where / kind for where in ("beside", "alone")]
        ours, theirs = (json.loads((f / "result.json").read_text())["metrics"] for f in folders)
        for name in ("train/loss", "train/grad_norm", "val/loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), (kind, name)
        weights = [read_weights(folder) for folder in folders]
        for name, value in weights[0].items():
            torch.testing.assert_close(value, weights[1][name], rtol=1e-2, atol=1e-4, msg=f"{kind}: {name}")


def test_the_capture_leaves_weights_and_moments_as_they_were(tmp_path: Path) -> None:
    """A learning rate of nothing: all that could move the weights is the warm-up."""
    config = config_of("zero", "trainer.accelerator=cuda", "optim.lr=1e-30", "optim.weight_decay=0")
    lane = Lane(open_run_dir(tmp_path, config))
    before = {name: value.clone() for name, value in lane.module.state_dict().items()}
    with lane.guarded():
        lane.advance()
    for name, value in lane.module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert {int(state["step"].item()) for state in lane.optimizer.state.values()} == {1}
    lane.close("KILLED")

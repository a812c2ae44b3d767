"""A longer run goes on from a shorter one's stable checkpoint as if it had trained from the start."""

import json
from pathlib import Path

import pytest

from conf.schema import OptimConfig
from lightning_modules.checkpoints import checkpoint_path, read_checkpoint
from lightning_modules.schedule import lr_factor, stable_steps
from tests.lightning_modules.launcher import train
from tests.lightning_modules.test_resume import SETTINGS, TIMINGS, assert_equal

OFF = "tracking.enabled=false"


def run(run_dir: Path, *argv: str) -> str:
    output = run_dir.parent / f"{run_dir.name}.txt"
    status = train([*SETTINGS, OFF, *argv, f"run_dir={run_dir}"], output)
    return f"{status}: {output.read_text()}"


def points(run_dir: Path) -> dict[tuple[str, int], float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    flat = [(key, record["step"], value) for record in records for key, value in record["metrics"].items()]
    assert len({(key, step) for key, step, _ in flat}) == len(flat), "a point twice"
    return {(key, step): value for key, step, value in flat if key not in TIMINGS}


def test_continued_run_is_bit_identical_and_another_config_is_refused(tmp_path):
    short, whole, continued = (tmp_path / name for name in ("short", "whole", "continued"))
    assert run(short, "trainer.max_steps=20", "trainer.keep_stable=true").startswith("0:")
    stable = short / "checkpoints" / "stable.ckpt"
    assert read_checkpoint(stable)["step"] == 17  # 20 steps, of which the last 2 decay
    assert run(whole).startswith("0:")
    said = run(continued, f"continue_from={stable}")
    assert f"continuing {stable} from step 17" in said
    ends = [read_checkpoint(checkpoint_path(path / "checkpoints", 32)) for path in (whole, continued)]
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "rng", "step"):
        assert_equal(ends[0][name], ends[1][name], name)
    assert points(whole) == points(continued)
    result = json.loads((continued / "result.json").read_text())
    assert (result["first_step_this_start"], result["continued_from"]) == (17, str(stable))

    said = run(tmp_path / "other", f"continue_from={stable}", "optim.lr=0.1")
    assert "error: " in said
    assert "belongs to a run with optim.lr=0.002, this one has optim.lr=0.1" in said
    shorter = run(tmp_path / "shorter", f"continue_from={stable}", "trainer.max_steps=18")
    assert "agree to step 15 alone: train from the start" in shorter


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("warmup", [0, 3, 30])
def test_stable_steps_are_those_that_longer_runs_share(decay, warmup):
    config = OptimConfig(warmup_steps=warmup, decay_fraction=decay)
    for steps in (1, 10, 20):
        shared = stable_steps(config, steps)
        longer = [[lr_factor(step, config, n) for step in range(shared + 1)] for n in (2 * steps, 3 * steps)]
        known = [lr_factor(step, config, steps) for step in range(min(shared + 1, steps))]
        if shared:  # the rate of the step to come is known, too, unless the shorter run ends there
            assert longer[0][: len(known)] == longer[1][: len(known)] == known

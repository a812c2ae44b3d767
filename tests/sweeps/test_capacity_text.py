"""A study of capacity over language models, with the real commands: tiny ones, of a text made here."""

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from conf.load import parse
from conf.sweep_schema import SweepConfig, check

ROOT = Path(__file__).parents[2]


def test_the_shipped_studies_hold():
    for name in ("capacity", "capacity-small", "capacity-text"):
        check(parse(SweepConfig, [str(ROOT / "conf" / "sweep" / f"{name}.yaml")]))


@pytest.mark.timeout(300)
def test_tiny_language_models_are_judged_by_their_losses(tmp_path):
    """Models of a text of few words beat its token frequencies and lose nothing on long prompts."""
    dice = random.Random(0)
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        words = dice.choices(["the ", "state ", "forgets ", "what ", "it ", "read.\n"], k=800)
        (texts / f"{i}.txt").write_text("".join(words))
    (tmp_path / "base.yaml").write_text(f"""\
model: {{d_model: 32, n_layers: 1, d_state: 8, headdim: 16}}
data: {{name: documents, documents: {{source: {texts}, val_fraction: 0.5}}}}
optim: {{lr: 1.0e-2, warmup_steps: 5}}
trainer: {{max_steps: 60, val_every: 60, checkpoint_every: 60, accelerator: cpu}}
""")
    (tmp_path / "sweep.yaml").write_text("""\
name: text
train: {base: base.yaml, tokens_per_step: 1024, metric: loss/max_beyond, direction: minimize}
capacity: {series: {d_state: {model.d_state: [8]}}, lengths: [32, 64], retry_lr: [], resamples: 2}
evaluate: {suites: [loss], loss.prompts: 4, device: cpu}
workers: 1
tracking: {enabled: false}
""")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "sweeps.run", "sweep.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The search has ended: 2 runs (2 holds, 0 collapsed, 0 unsolved)" in done.stdout
    assert "T_recall does not apply" in done.stdout
    with (tmp_path / "runs" / "text" / "results.csv").open() as file:
        rows = {int(row["train_length"]): row for row in csv.DictReader(file)}
    for length, row in rows.items():
        assert int(row["asked_to"]) == 64 * length
        assert 0 < float(row["in_length_loss"]) < float(row["unigram_loss"]) < 3.5
        evaluation = json.loads((Path(tmp_path, row["run_dir"]) / "evaluation/evaluation.json").read_text())
        loss = evaluation["loss"]
        assert max(loss["loss"][:4]) == pytest.approx(float(row["in_length_max_loss"]))
        assert len(loss["error"]) == 256
        assert all(error > 0 for error in loss["error"])

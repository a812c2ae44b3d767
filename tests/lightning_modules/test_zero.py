"""ZeRO on gloo processes trains as one process does, and its checkpoints are everyone's."""

import json
import os
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.load import parse
from conf.schema import TrainConfig
from lightning_modules.callbacks import saving
from lightning_modules.checkpoints import checkpoint_path, read_checkpoint
from lightning_modules.ranks import require_world_size
from lightning_modules.strategies.zero import build_strategy
from lightning_modules.train import main
from tests.lightning_modules.launcher import (
    join,
    rendezvous,
    start,
    start_train,
    train,
    train_on_ranks,
    wait_until,
)
from tests.lightning_modules.test_ranks import SETTINGS, assert_close, contents, cut_off, metrics
from tests.lightning_modules.test_resume import assert_equal

# Gathered for each use and let go after it, however small: by default DeepSpeed keeps small ones whole.
SHARD_ALL = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
SEGMENTS = "trainer.segment_length=20"
CARRIED = ["initial_state.name=carried", "initial_state.reset_probability=0.2"]


def zero(stage: int, folder: Path) -> list[str]:
    argv = ["trainer.strategy=deepspeed", f"deepspeed.stage={stage}"]
    if stage == 3:
        (folder / "shard.json").write_text(json.dumps({"zero_optimization": SHARD_ALL}))
        argv.append(f"deepspeed.config={folder / 'shard.json'}")
    return argv


def train_on(ranks: int, argv: list[str], run_dir: Path) -> None:
    output = run_dir.with_suffix(".txt")
    argv = [*argv, f"run_dir={run_dir}"]
    assert set(train_on_ranks(ranks, argv, output)) == {0}, output.read_text()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of one process."""
    run_dir = tmp_path_factory.mktemp("one") / "one"
    output = run_dir.with_suffix(".txt")
    assert train([*SETTINGS, *CARRIED, f"run_dir={run_dir}"], output) == 0, output.read_text()
    return run_dir


def check_same(expected: Path, run_dir: Path, *steps: int) -> None:
    for step in steps:
        theirs, ours = contents(expected, step), contents(run_dir, step)
        for part in ("state_dict", "initial_state"):
            assert_close(theirs[part], ours[part])
        moments = [c["optimizer_states"][0] for c in (theirs, ours)]
        assert moments[0]["state"].keys() == moments[1]["state"].keys()
        for index, state in moments[0]["state"].items():
            for key, value in state.items():
                difference = (moments[1]["state"][index][key] - value).norm()
                assert difference <= 1e-4 * value.norm(), (step, index, key)
        for a, b in zip(*(m["param_groups"] for m in moments), strict=True):
            assert (a["params"], a["weight_decay"]) == (b["params"], b["weight_decay"])


@pytest.mark.parametrize(
    ("stage", "offload", "segments"),
    [
        pytest.param(1, [], [], marks=pytest.mark.slow),
        (2, ["offload_optimizer"], [SEGMENTS]),
        (3, ["offload_optimizer", "offload_parameters"], [SEGMENTS]),
        pytest.param(2, [], [], marks=pytest.mark.slow),
        pytest.param(3, [], [], marks=pytest.mark.slow),
    ],
)
def test_two_ranks_train_as_one_process_and_any_process_goes_on(
    tmp_path: Path, one: Path, stage: int, offload: list[str], segments: list[str]
) -> None:
    """Weights, moments, states, clipped norms; segments or not. Then plain training continues, alone."""
    run_dir, alone = tmp_path / "two", tmp_path / "alone"
    argv = [*SETTINGS, *CARRIED, *segments]
    train_on(2, [*argv, *zero(stage, tmp_path), *(f"deepspeed.{name}=true" for name in offload)], run_dir)
    check_same(one, run_dir, 3, 6)
    assert_close(metrics(one), metrics(run_dir))
    text = run_dir.with_suffix(".txt").read_text()
    assert text.count(f"DeepSpeed ZeRO-{stage}; kept in:") == 1
    assert "mixer.A_log            float32" in text
    cut_off(run_dir, alone)
    assert train([*argv, f"run_dir={alone}"], tmp_path / "alone.txt") == 0
    check_same(one, alone, 6)


def test_zero_goes_on_from_a_plain_checkpoint(tmp_path: Path, one: Path) -> None:
    run_dir = tmp_path / "two"
    cut_off(one, run_dir)
    train_on(2, [*SETTINGS, *CARRIED, *zero(2, tmp_path)], run_dir)
    check_same(one, run_dir, 6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_four_ranks_one_rank(tmp_path: Path, one: Path, stage: int) -> None:
    two, four, last = tmp_path / "two", tmp_path / "four", tmp_path / "last"
    argv = [*SETTINGS, *CARRIED]
    train_on(2, [*argv, *zero(3, tmp_path)], two)
    cut_off(two, four)
    train_on(4, [*argv, *zero(stage, tmp_path)], four)
    check_same(one, four, 6)
    cut_off(four, last)
    train_on(1, [*argv, *zero(stage, tmp_path)], last)
    check_same(one, last, 6)


@pytest.mark.slow
def test_bf16_keeps_what_the_recurrence_needs_in_fp32(tmp_path: Path) -> None:
    run_dir, alone = tmp_path / "two", tmp_path / "alone"
    argv = [*SETTINGS, "trainer.precision=bf16-mixed"]
    train_on(2, [*argv, *zero(2, tmp_path)], run_dir)
    assert train([*argv, f"run_dir={alone}"], tmp_path / "alone.txt") == 0
    for a, b in zip(metrics(alone), metrics(run_dir), strict=True):
        assert b == pytest.approx(a, rel=2e-2)


def fused_main(environment: dict[str, str], argv: list[str]) -> int:
    """Train with the fused layer of a GPU, in Triton's interpreter."""
    from lightning_modules.layer import Mamba2

    os.environ |= environment
    Mamba2._fuses = lambda self, *_: self.scan is None  # type: ignore[method-assign]
    return main(argv)


@pytest.mark.slow
@pytest.mark.parametrize("shard_all", [False, True])
def test_stage_3_gathers_what_a_fused_layer_reads(tmp_path: Path, shard_all: bool) -> None:
    """Weights of modules that it does not call; small ones too, in segments."""
    segments = ["trainer.segment_length=8"] if shard_all else []
    argv = [*SETTINGS, *segments, "data.train_length=16", "trainer.max_steps=1", "trainer.accelerator=cpu"]
    argv += ["data.curriculum_steps=0", "model.d_state=16"]
    assert train([*argv, f"run_dir={tmp_path / 'plain'}"], tmp_path / "plain.txt") == 0
    output, environment = tmp_path / "fused.txt", rendezvous() | {"TRITON_INTERPRET": "1"}
    argv += [
        *zero(3, tmp_path)[: 3 if shard_all else 2],
        "trainer.devices=2",
        f"run_dir={tmp_path / 'fused'}",
    ]
    ranks = [start(fused_main, environment | {"LOCAL_RANK": str(i)}, argv, output=output) for i in range(2)]
    assert join(ranks) == [0, 0], output.read_text()
    check_same(tmp_path / "plain", tmp_path / "fused", 1)


def broken_main(environment: dict[str, str], argv: list[str], what: str) -> int:
    """Train a model with something wrong in layer 1; count what reaches each gradient, and the layers that
    stage 3 holds whole at once."""
    from lightning_modules.finite import GradientWatch
    from lightning_modules.language_model import LanguageModel

    os.environ |= environment
    configure, counts, whole = LanguageModel.configure_model, Counter[str](), Counter[int]()

    def configure_model(self: LanguageModel) -> None:
        first = "model" not in self._modules
        configure(self)
        layers: Any = self.model.backbone.layers

        def look(*arguments: Any) -> None:
            statuses = [
                {p.ds_status.name for p in layer.parameters() if hasattr(p, "ds_id")} for layer in layers
            ]
            whole[sum("AVAILABLE" in status for status in statuses)] += 1

        for layer in layers if first else ():
            layer.mixer.norm.register_forward_hook(look)
        weight: Any = self.model.get_parameter("backbone.layers.1.mixer.in_proj.weight")
        if what == "gradient" and not weight._backward_hooks:
            weight.register_hook(lambda gradient: gradient * float("inf"))
        if what == "loss":
            weight.data.fill_(3e38)

    add = GradientWatch._add

    def count(self: GradientWatch, name: str, gradient: Any) -> None:
        counts[name] += 1
        add(self, name, gradient)

    LanguageModel.configure_model = configure_model  # type: ignore[method-assign]
    GradientWatch._add = count  # type: ignore[method-assign]
    status = main(argv)
    print("counts", sorted(set(counts.values())), len(counts), "whole at once", dict(whole))
    sys.stdout.flush()
    return status


def run_broken(tmp_path: Path, stage: int, what: str) -> str:
    output = tmp_path / "output.txt"
    argv = [
        *SETTINGS,
        *zero(stage, tmp_path),
        SEGMENTS,
        f"run_dir={tmp_path / 'run'}",
        "trainer.accelerator=cpu",
    ]
    process = start(partial(broken_main, what=what), {**rendezvous(), "LOCAL_RANK": "0"}, argv, output=output)
    process.join()
    text = output.read_text()
    assert process.exitcode == (0 if what == "nothing" else 1), text
    return text


@pytest.mark.parametrize(
    ("stage", "what", "blamed"),
    [
        (3, "loss", "first not finite: the output of backbone.layers.1.mixer.in_proj"),
        (2, "gradient", "first there: the gradient of backbone.layers.1.mixer.in_proj.weight"),
    ],
)
def test_what_is_not_finite_is_named(tmp_path: Path, stage: int, what: str, blamed: str) -> None:
    text = run_broken(tmp_path, stage, what)
    assert text.count("error: ") == 1
    assert blamed in text
    assert "Traceback" not in text


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gradient_arrives_once_a_backward_pass(tmp_path: Path, stage: int) -> None:
    """Six steps of two micro-batches in three segments each: 12 arrivals, not 36. Stage 3 gathers a layer at
    a time: as dtypes are looked at, for each segment of 12 micro-batches and 4 of validation, and for the two
    of each of the 12 that are recomputed.
    """
    layers = {1 if stage == 3 else 0: 2 * (1 + 3 * (12 + 4) + 2 * 12)}
    assert f"counts [12] 20 whole at once {layers}" in run_broken(tmp_path, stage, "nothing")


def test_a_killed_rank_ends_the_job_with_one_line_and_it_goes_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    argv = [*SETTINGS, *zero(2, tmp_path), f"run_dir={run_dir}", "trainer.max_steps=90"]
    argv += ["trainer.accelerator=cpu", "trainer.devices=2"]
    outputs = [tmp_path / f"{rank}.txt" for rank in (0, 1)]
    meeting = rendezvous()
    ranks = [start_train(argv, outputs[rank], LOCAL_RANK=str(rank), **meeting) for rank in (0, 1)]
    assert wait_until(checkpoint_path(run_dir / "checkpoints", 6).exists, ranks[0]), outputs[0].read_text()
    assert ranks[1].pid is not None
    os.kill(ranks[1].pid, signal.SIGKILL)
    began = time.monotonic()
    ranks[0].join(60)
    assert ranks[0].exitcode == 1, f"{time.monotonic() - began} s\n{outputs[0].read_text()}"
    text = outputs[0].read_text()
    assert text.count("error: ") == 1
    assert "another rank has ended" in text
    assert "Traceback" not in text
    assert train([*argv, "trainer.devices=1"], outputs[1]) == 0, outputs[1].read_text()
    assert "continuing from" in outputs[1].read_text()
    assert checkpoint_path(run_dir / "checkpoints", 90).exists()


def test_a_checkpoint_written_while_training_goes_on_is_the_same(tmp_path: Path, one: Path) -> None:
    run_dir = tmp_path / "run"
    argv = [*SETTINGS, *CARRIED, f"run_dir={run_dir}", "trainer.async_checkpoints=true"]
    assert train(argv, tmp_path / "output.txt") == 0
    for step in (3, 6):
        for part in ("state_dict", "optimizer_states", "initial_state"):
            assert_equal(contents(one, step)[part], contents(run_dir, step)[part], part)
    assert (run_dir / "checkpoints" / "last.ckpt").resolve() == checkpoint_path(run_dir / "checkpoints", 6)


def test_a_background_write_copies_first_and_tells_its_outcome(tmp_path: Path) -> None:
    checkpoint_io = saving.AtomicCheckpointIO()
    checkpoint_io.in_background = True
    weight = torch.zeros(1000)
    contents = {"state_dict": {"a": weight, "tied": weight}, "config": {}, "step": 1}
    checkpoint_io.save_checkpoint(contents, tmp_path / "a.ckpt")
    weight.fill_(1)
    checkpoint_io.wait()
    saved = read_checkpoint(tmp_path / "a.ckpt")["state_dict"]
    assert not saved["a"].any()
    assert saved["a"].data_ptr() == saved["tied"].data_ptr()
    checkpoint_io.save_checkpoint(contents, tmp_path / "missing" / "a.ckpt")
    with pytest.raises(OSError, match="No such file"):
        checkpoint_io.wait()


def test_another_number_of_ranks_than_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    require_world_size(parse(TrainConfig, ["trainer.devices=2", "trainer.num_nodes=2"]))
    with pytest.raises(ValueError, match="asks for 2 ranks, but torchrun started 4"):
        require_world_size(parse(TrainConfig, ["trainer.devices=2"]))
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    with pytest.raises(ValueError, match=r"asks for 2 ranks, but srun started 8: .* continues on any number"):
        require_world_size(parse(TrainConfig, ["trainer.devices=2"]))


def test_deepspeed_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"trainer.strategy=deepspeed: DeepSpeed cannot be imported"):
        build_strategy(parse(TrainConfig, ["trainer.strategy=deepspeed"]), on_cpu=True)

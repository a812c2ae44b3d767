"""The recurrent state: its shapes, what it refuses, and memory that does not grow with the tokens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conf.schema import ModelConfig
from kernels.ssd import Mitigation
from lightning_modules.backbone import Mamba2LM
from lightning_modules.state import ModelState

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model() -> Mamba2LM:
    torch.manual_seed(0)
    return Mamba2LM(
        ModelConfig(d_model=16, n_layers=2, d_state=4, headdim=8, n_groups=2, d_conv=3, vocab_size=9)
    )


def tensors(state: ModelState) -> list[torch.Tensor]:
    return [t for layer in state.layers for t in layer.tensors()] + [state.position]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_state_is_the_start(model: Mamba2LM, dtype: torch.dtype) -> None:
    """Shapes as documented; the SSM state is fp32 whatever the model computes in."""
    model = model.to(dtype)
    state = ModelState.zeros(model.config, 3, "cpu", dtype, Mitigation())
    assert [tuple(t.shape) for t in tensors(state)] == [(3, 48, 2), (3, 4, 8, 4)] * 2 + [(3,)]
    assert not any(t.any() for t in tensors(state))
    ids = torch.randint(9, (3, 10))
    out = model(ids, state)
    assert torch.equal(out.logits, model(ids).logits)
    for before, after in zip(tensors(state), tensors(out.state), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
    assert {layer.ssm.dtype for layer in out.state.layers} == {torch.float32}
    assert out.state.batch_size == 3


def test_a_call_leaves_its_state_untouched(model: Mamba2LM) -> None:
    """So that one state can be continued twice."""
    state = model(torch.randint(9, (2, 5))).state.detach()
    copies = [t.clone() for t in tensors(state)]
    first = model(torch.zeros(2, 40, dtype=torch.int64), state)
    second = model(torch.zeros(2, 40, dtype=torch.int64), state)
    assert torch.equal(first.logits, second.logits)
    assert all(torch.equal(a, b) for a, b in zip(copies, tensors(state), strict=True))


def test_state_holds_its_own_memory(model: Mamba2LM) -> None:
    """A carried state must not keep the activations of the segment it came from alive."""
    with torch.no_grad():
        state = model(torch.randint(9, (1, 4000))).state
    for tensor in tensors(state):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_other_mitigation_or_rows_are_refused(model: Mamba2LM) -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    forget = Mitigation(name="forget_more", alpha_scale=0.9)
    state = model(ids, mitigation=forget).state
    model(ids, state, mitigation=Mitigation(name="forget_more", alpha_scale=0.9))
    for other in (None, Mitigation(name="forget_more", alpha_scale=0.8), Mitigation(name="delta_scale")):
        with pytest.raises(ValueError, match="mitigation"):
            model(ids, state, mitigation=other)
    with pytest.raises(ValueError, match="2 rows, the batch 3"):
        model(torch.zeros(3, 3, dtype=torch.int64), state, mitigation=forget)


def test_detach_cuts_the_graph(model: Mamba2LM) -> None:
    state = model(torch.zeros(1, 5, dtype=torch.int64)).state
    assert state.layers[0].ssm.requires_grad
    detached = state.detach()
    assert not any(t.requires_grad for t in tensors(detached))
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), tensors(detached), strict=True))


def test_rows_select_and_repeat(model: Mamba2LM) -> None:
    """Continuing from chosen rows equals running those rows from the start."""
    ids, more = torch.randint(9, (3, 12)), torch.randint(9, (4, 6))
    index = torch.tensor([2, 0, 0, 1])
    state = model(ids).state.rows(index)
    assert state.batch_size == 4
    expected = model(torch.cat([ids[index], more], dim=1)).logits[:, 12:]
    torch.testing.assert_close(model(more, state).logits, expected, rtol=1e-4, atol=1e-5)


STREAM = """
import json, sys, torch
from conf.schema import ModelConfig
from lightning_modules.backbone import Mamba2LM

torch.set_num_threads(1)
model = Mamba2LM(ModelConfig(d_model=16, n_layers=2, d_state=8, headdim=16, vocab_size=16, chunk_size=16))
tokens, segment, state, total = int(sys.argv[1]), 8192, None, 0.0
with torch.inference_mode():
    for i in range(tokens // segment):
        ids = torch.randint(16, (1, segment), generator=torch.Generator().manual_seed(i))
        losses, state = model.token_losses(ids, ids.roll(-1, 1), state)
        total += losses.mean().item()
# not ru_maxrss, which starts at the size of the process that launched this one
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({
    "peak_kib": int(peak.split()[1]),
    "position": state.position.item(),
    "loss": total / (tokens // segment),
}))
"""


def stream(tokens: int) -> dict:
    command = [sys.executable, "-c", STREAM, str(tokens)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
@pytest.mark.parametrize("tokens", [262_144, pytest.param(1_048_576, marks=pytest.mark.slow)])
def test_memory_is_flat_in_length(tokens: int) -> None:
    """Carried state: the peak is within 10% of that of 65,536 tokens, imports included, and within 16 MiB."""
    short, long = stream(65_536), stream(tokens)
    assert long["position"] == tokens
    assert abs(long["loss"] - short["loss"]) < 0.1
    assert long["peak_kib"] <= 1.1 * short["peak_kib"]
    assert long["peak_kib"] - short["peak_kib"] <= 16 * 1024

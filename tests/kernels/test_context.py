"""The operators on a sharded sequence against the same operators on the whole of it, on 2 and 4 processes."""

import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.context import Context, bench
from kernels.context.group import OVERLAP_TOKENS
from kernels.conv import causal_conv1d
from kernels.ssd import Mitigation, ssd_scan
from tests.conftest import assert_close
from tests.lightning_modules.launcher import call_on_ranks

ROOT = Path(__file__).parents[2]
BATCH, HEADS, HEADDIM, GROUPS, D_STATE, WIDTH = 2, 4, 3, 2, 5, 4
Leaves = dict[str, Tensor]
MITIGATIONS = {
    "none": None,
    "forget_more": Mitigation("forget_more", alpha_scale=0.97, insert_scale=0.8),
    "token_filter": Mitigation("token_filter", threshold=0.3, heads=(1, 2)),
    "hard_reset": Mitigation("hard_reset", every=7),
}


def document_starts(kind: str, length: int, size: int) -> Tensor | None:
    """none; anywhere; at the borders of pieces, in some rows; at a border's last and second token."""
    starts = torch.zeros(BATCH, length, dtype=torch.bool)
    piece = length // size
    if kind == "none":
        return None
    if kind == "anywhere":
        return torch.rand(BATCH, length) < 0.1
    if kind == "borders":
        starts[0, ::piece] = True
        starts[1, piece] = True
        return starts
    starts[0, piece - 1 :: piece] = True
    starts[1, 1::piece] = True
    return starts


def mine(context: Context, t: Tensor | None, segments: int = 1) -> list[Tensor | None]:
    """This rank's piece of each of `segments` segments."""
    if t is None:
        return [None] * segments
    return [part.chunk(context.size, 1)[context.rank] for part in t.chunk(segments, 1)]


def whole(context: Context, pieces: list[Tensor]) -> Tensor:
    """The inverse of `mine`."""
    return torch.cat([torch.cat(list(context.all_gather(piece)), 1) for piece in pieces], 1)


def fresh(leaves: Leaves) -> Leaves:
    return {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}


def gradients(loss: Tensor, leaves: Leaves) -> Leaves:
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def compare(actual: Leaves, expected: Leaves) -> None:
    """Gradients of tokens lie on their ranks' pieces, zero elsewhere; of shared tensors ranks hold shares:
    either way their sum is the whole gradient."""
    for name, gradient in actual.items():
        gradient = gradient.contiguous()  # of one layout on all ranks
        dist.all_reduce(gradient)
        assert_close(gradient, expected[name], 1e-5, f"gradient of {name}", floor=1e-3)


def scan_leaves(length: int, slow: bool = False) -> Leaves:
    A = torch.full((HEADS,), 1e-7) if slow else torch.rand(HEADS) + 0.1
    return {
        "x": torch.randn(BATCH, length, HEADS, HEADDIM),
        "dt": torch.randn(BATCH, length, HEADS),
        "A": -A,
        "B": torch.randn(BATCH, length, GROUPS, D_STATE),
        "C": torch.randn(BATCH, length, GROUPS, D_STATE),
        "D": torch.randn(HEADS),
        "dt_bias": torch.randn(HEADS),
        "initial_state": torch.randn(BATCH, HEADS, HEADDIM, D_STATE),
    }


def check_scan(context: Context, length: int, documents: str, rule: str, segments: int, slow: bool) -> None:
    mitigation = MITIGATIONS[rule]
    starts = document_starts(documents, length, context.size * segments)
    leaves = scan_leaves(length, slow)
    weight, of_state = torch.randn_like(leaves["x"]), torch.randn_like(leaves["initial_state"])
    position = torch.tensor([3, 0])
    common: dict[str, Any] = {"dt_softplus": True, "mitigation": mitigation, "chunk_size": 16}

    one = fresh(leaves)
    y, final = ssd_scan(**one, document_starts=starts, position=position, **common)
    expected = gradients((weight * y).sum() + (of_state * final).sum(), one)

    own = fresh(leaves)
    state, outputs, seen = own["initial_state"], [], position
    tokens = [mine(context, own[name], segments) for name in ("x", "dt", "B", "C")]
    for *piece, of_piece in zip(*tokens, mine(context, starts, segments), strict=True):
        x, dt, B, C = piece
        before, seen = context.positions(seen, of_piece, x.shape[1])
        part, state = context.ssd_scan(
            x, dt, own["A"], B, C, D=own["D"], dt_bias=own["dt_bias"], initial_state=state,
            document_starts=of_piece, position=before, **common,
        )  # fmt: skip
        outputs.append(part)
    loss = (torch.cat(mine(context, weight, segments), 1) * torch.cat(outputs, 1)).sum()
    if context.rank == 0:
        loss = loss + (of_state * state).sum()
    actual = gradients(loss, own)
    assert_close(whole(context, [t.detach() for t in outputs]), y.detach(), 1e-5, "y")
    assert_close(state.detach(), final.detach(), 1e-5, "final state")
    compare(actual, expected)


def check_conv(context: Context, length: int, documents: str, segments: int) -> None:
    channels = 6
    starts = document_starts(documents, length, context.size * segments)
    leaves = {
        "x": torch.randn(BATCH, length, channels),
        "weight": torch.randn(channels, WIDTH),
        "bias": torch.randn(channels),
        "initial_state": torch.randn(BATCH, channels, WIDTH - 1),
    }
    weight, of_state = torch.randn_like(leaves["x"]), torch.randn_like(leaves["initial_state"])

    one = fresh(leaves)
    y, final = causal_conv1d(**one, document_starts=starts)
    expected = gradients((weight * y).sum() + (of_state * final).sum(), one)

    own = fresh(leaves)
    state, outputs = own["initial_state"], []
    for x, of_piece in zip(mine(context, own["x"], segments), mine(context, starts, segments), strict=True):
        part, state = context.causal_conv1d(
            x, own["weight"], own["bias"], initial_state=state, document_starts=of_piece
        )
        outputs.append(part)
    loss = (torch.cat(mine(context, weight, segments), 1) * torch.cat(outputs, 1)).sum()
    if context.rank == 0:
        loss = loss + (of_state * state).sum()
        assert_close(state.detach(), final.detach(), 1e-6, "final state")
    actual = gradients(loss, own)
    assert_close(whole(context, [t.detach() for t in outputs]), y.detach(), 1e-5, "y")
    compare(actual, expected)


KINDS = ("none", "anywhere", "borders", "beside borders")


def check_all(size: int, overlap: bool) -> None:
    context = Context(dist.group.WORLD, overlap)
    for documents, segments in itertools.product(KINDS, (1, 3)):
        check_conv(context, 12 * size * segments, documents, segments)
        for rule in MITIGATIONS:
            check_scan(context, 12 * size * segments, documents, rule, segments, slow=False)
    check_conv(context, (WIDTH - 1) * size, "none", 1)  # the shortest pieces
    check_scan(context, size, "none", "none", 1, slow=False)
    check_scan(context, 512 * size, "none", "none", 1, slow=True)
    check_bytes(context)
    check_refusals(context)


def assert_saves_no_more(output: Tensor) -> None:
    """What the node behind `output` keeps for its gradient is not a view into something larger."""
    assert output.grad_fn is not None
    saved: Any = output.grad_fn
    for t in saved.saved_tensors:
        assert t is None or t.untyped_storage().nbytes() == t.nbytes


def layer_bytes(context: Context, length: int) -> int:
    """What a rank sends for one layer, forward and backward, of pieces of `length` tokens."""
    before = context.bytes_sent
    leaves = fresh(scan_leaves(length))
    state, channels = leaves.pop("initial_state"), 6
    x = torch.randn(BATCH, length, channels, requires_grad=True)
    y, _ = context.causal_conv1d(x, torch.randn(channels, WIDTH), None)
    z, _ = context.ssd_scan(**leaves, initial_state=state, dt_softplus=True)
    assert_saves_no_more(z)
    (y.sum() + z.sum()).backward()
    return context.bytes_sent - before


def check_bytes(context: Context) -> None:
    """(H + HPN) numbers forward and HPN backward, W - 1 inputs of the convolution each way: whatever T is."""
    state = BATCH * HEADS * HEADDIM * D_STATE
    expected = 4 * (2 * state + BATCH * HEADS + 2 * BATCH * 6 * (WIDTH - 1))
    assert [layer_bytes(context, length) for length in (4, 64, 1024)] == [expected] * 3


def check_refusals(context: Context) -> None:
    leaves = scan_leaves(8)
    for mitigation, reason in {
        Mitigation("state_norm", max_norm=1.0, every=1): "clipping is not linear",
        Mitigation("sliding_window", window=4): "a window of tokens",
        Mitigation("hard_reset", every=4, heads=(1,)): "document starts of their own",
    }.items():
        with pytest.raises(ValueError, match=reason):
            context.ssd_scan(**leaves, dt_softplus=True, mitigation=mitigation)
    with pytest.raises(ValueError, match="at least d_conv - 1 = 3"):
        context.causal_conv1d(torch.randn(1, 2, 6), torch.randn(6, WIDTH), None)


def test_overlap_where_it_pays() -> None:
    group: Any = SimpleNamespace(size=lambda: 5)
    assert Context(group).scans_before_merging(4 * OVERLAP_TOKENS - 1)
    assert not Context(group).scans_before_merging(4 * OVERLAP_TOKENS)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_pieces_equal_the_whole(tmp_path: Path, size: int, overlap: bool) -> None:
    call_on_ranks(size, check_all, size, overlap, output=tmp_path / "output.txt")


def test_projection_says_what_the_model_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["project=true"]) == 0
    assert "1024        8   128" in capsys.readouterr().out
    layer = bench.Layer()
    short, long = (bench.efficiency(layer, 8, tokens, bench.NODE) for tokens in (4096, 131_072))
    assert 0 < short < long < 1


def test_bench_measures() -> None:
    command = [sys.executable, "-m", "kernels.context.bench", "length=256", "repeats=1"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    state = 8 * 32 * 64
    expected = 4 * (2 * state + 8 + 2 * 3 * (8 * 32 + 2 * 64))
    assert f"bytes that a rank sends: {expected:,}" in printed

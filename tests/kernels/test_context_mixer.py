"""The fused layer of pieces against that of the whole, on 2 and 4 processes, in Triton's interpreter."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.context import Context
from kernels.mixer import fused_mixer, launch
from kernels.ssd import Mitigation
from kernels.ssd.triton_launch import Launches
from kernels.ssd.triton_scan import launches
from tests.conftest import assert_close
from tests.kernels.test_context import (
    assert_saves_no_more,
    compare,
    document_starts,
    fresh,
    gradients,
    mine,
    whole,
)
from tests.lightning_modules.launcher import call_on_ranks

BATCH, HEADS, HEADDIM, GROUPS, D_STATE, WIDTH, D_MODEL = 2, 2, 16, 2, 16, 4, 8
D_INNER, OF_STATE = HEADS * HEADDIM, GROUPS * D_STATE
CHANNELS = D_INNER + 2 * OF_STATE
OPTIONS: dict[str, Any] = {
    "headdim": HEADDIM, "n_groups": GROUPS, "eps": 1e-5, "norm_before_gate": False,
    "dt_limit": (0.0, float("inf")),
}  # fmt: skip
FORGET = Mitigation("forget_more", alpha_scale=0.97, insert_scale=0.8)
Leaves = dict[str, Tensor]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted on CPU tensors")


def leaves_of(length: int) -> Leaves:
    return {
        "zxbcdt": torch.randn(BATCH, length, D_INNER + CHANNELS + HEADS),
        "conv_weight": torch.randn(CHANNELS, WIDTH) / 2,
        "conv_bias": torch.randn(CHANNELS) / 2,
        "dt_bias": torch.randn(HEADS),
        "A": -(torch.rand(HEADS) + 0.1) * 10 / length,  # a long piece does not forget all either
        "D": torch.randn(HEADS),
        "norm_weight": torch.randn(D_INNER),
        "out_weight": torch.randn(D_MODEL, D_INNER) / D_INNER**0.5,
        "conv_state": torch.randn(BATCH, CHANNELS, WIDTH - 1),
        "initial_state": torch.randn(BATCH, HEADS, HEADDIM, D_STATE),
    }


def check(
    context: Context, length: int, documents: str, segments: int, rule: Mitigation, states: bool
) -> None:
    """Outputs, states and every gradient; after `segments` segments, each of them sharded."""
    starts = document_starts(documents, length, context.size * segments)
    leaves = leaves_of(length)
    if not states:
        del leaves["conv_state"], leaves["initial_state"]
    options = OPTIONS | {"mitigation": rule}
    weight = torch.randn(BATCH, length, D_MODEL)
    of_conv, of_state = torch.randn(BATCH, CHANNELS, WIDTH - 1), torch.randn(BATCH, HEADS, HEADDIM, D_STATE)

    one = fresh(leaves)
    out, conv, state = fused_mixer(**one, document_starts=starts, **options)
    loss = (weight * out).sum() + states * ((of_conv * conv).sum() + (of_state * state).sum())
    expected = gradients(loss, one)

    own, outputs, mixer = fresh(leaves), [], context.mixer
    assert mixer is not None
    tensors = {name: t for name, t in own.items() if name not in ("zxbcdt", "conv_state", "initial_state")}
    last: Any = own.get("conv_state"), own.get("initial_state")
    pieces = mine(context, own["zxbcdt"], segments), mine(context, starts, segments)
    for zxbcdt, of_piece in zip(*pieces, strict=True):
        part, *last = mixer(
            zxbcdt, **tensors, **options, conv_state=last[0], initial_state=last[1], document_starts=of_piece
        )
        outputs.append(part)
    loss = (torch.cat(mine(context, weight, segments), 1) * torch.cat(outputs, 1)).sum()
    if context.rank == 0:
        assert_close(last[0].detach(), conv.detach(), 1e-5, "the convolution's final state")
        loss = loss + states * ((of_conv * last[0]).sum() + (of_state * last[1]).sum())
    actual = gradients(loss, own)
    assert_close(whole(context, [t.detach() for t in outputs]), out.detach(), 1e-5, "out")
    assert_close(last[1].detach(), state.detach(), 1e-5, "final state")
    compare(actual, expected)


def check_all() -> None:
    context = Context(dist.group.WORLD, overlap=False)
    check(context, 10 * context.size, "beside borders", 2, FORGET, states=True)
    if context.size > 2:
        return
    for documents in ("none", "anywhere", "borders"):
        check(context, 10, documents, 1, FORGET, states=True)
    check(context, 6, "none", 1, Mitigation(), states=False)  # the shortest pieces
    with mock.patch.object(launch, "launches", side_by_side):
        check(context, 140, "none", 1, Mitigation(), states=True)
    check_bytes(context)
    check_alone(Context(dist.new_subgroups(1)[0]))
    with pytest.raises(ValueError, match="at least d_conv - 1 = 3"):
        check(context, 4, "none", 1, Mitigation(), states=False)


def side_by_side(*given: Any) -> Launches:
    """As where rows are few and long: the two chunks of a piece are segments, and merged twice."""
    call = launches(*given[:-1], 2)
    assert call.plan.parallel
    assert call.plan.segments == 2
    return call


def check_bytes(context: Context) -> None:
    """As much as the operators one by one send, whatever the length: kernels/context/README.md."""
    state = BATCH * HEADS * HEADDIM * D_STATE
    expected = 4 * (2 * state + BATCH * HEADS + 2 * BATCH * CHANNELS * (WIDTH - 1))
    for length in (8, 80):
        before, own, mixer = context.bytes_sent, fresh(leaves_of(length)), context.mixer
        assert mixer is not None
        out, _, _ = mixer(**own, mitigation=Mitigation(), **OPTIONS)
        assert_saves_no_more(out)
        out.sum().backward()
        assert context.bytes_sent - before == expected


def check_alone(context: Context) -> None:
    """A state that is handed on does not keep the tokens, of one rank neither."""
    assert context.mixer is not None
    for t in context.mixer(**leaves_of(8), mitigation=Mitigation(), **OPTIONS)[1:]:
        assert t.untyped_storage().nbytes() == t.nbytes


@pytest.mark.parametrize("size", [2, 4])
def test_pieces_equal_the_whole(tmp_path: Path, size: int) -> None:
    call_on_ranks(size, check_all, output=tmp_path / "output.txt")

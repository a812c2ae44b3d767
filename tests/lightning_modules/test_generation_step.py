"""The step of one token: on a GPU a graph that makes what the eager step makes; it never asks the device."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.ssd.token
import lightning_modules.generation.step
from conf.generate_schema import DecodingConfig
from kernels.conv import causal_conv1d
from kernels.ssd import ssd_scan, ssd_step
from lightning_modules.backbone import Mamba2LM
from lightning_modules.generation.sampling import Sampler
from lightning_modules.generation.step import CapturedStep, Step
from lightning_modules.mitigations import for_layers
from tests.lightning_modules.test_backbone_pieces import build
from tests.lightning_modules.test_generation_batch import CONFIG, LENGTHS, MITIGATIONS, check_states

SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_k": 20, "top_p": 0.95, "min_p": 0.01}


class AsksNothing(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name() not in ("aten::_local_scalar_dense", "aten::nonzero"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["token_filter", "state_norm", "some heads", "by layer"])
def test_the_step_never_asks_the_device(name: str, monkeypatch: pytest.MonkeyPatch, check_close: Any) -> None:
    """A CUDA graph cannot hold it. On the GPU's kernels, interpreted where there is none."""
    if not torch.cuda.is_available():
        here: Any = kernels.ssd.token
        monkeypatch.setattr(here, "ssd_step", partial(ssd_step, backend="triton"))
        monkeypatch.setattr(here, "ssd_scan", partial(ssd_scan, backend="triton"))
        there: Any = lightning_modules.generation.step
        monkeypatch.setattr(there, "causal_conv1d", partial(causal_conv1d, backend="triton"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, rules = build(CONFIG, seed=0).to(device).eval(), for_layers(MITIGATIONS[name], 2)
    with torch.no_grad():
        before = model(torch.randint(64, (3, 9), device=device), mitigation=rules).state
    step = Step(model, before, rules, Sampler(DecodingConfig(**SAMPLING), 64))
    active = torch.tensor([True, False, True], device=device)
    given = torch.tensor([1, 2, 3], device=device), active, torch.rand(3, device=device).double()
    step._run(*given)  # as before a capture: what is cached is there

    def refuse(_: Tensor) -> None:
        raise AssertionError("tolist")

    with AsksNothing(), monkeypatch.context() as patch:
        patch.setattr(Tensor, "tolist", refuse)
        step._run(*given)
    with torch.no_grad():
        after = model(given[0][:, None].expand(3, 2), before, mitigation=rules).state
    rows = torch.tensor([0, 2], device=device)
    check_states(step.state.rows(rows), after.rows(rows), check_close)
    kept = torch.tensor([1], device=device)
    assert all(map(torch.equal, step.state.rows(kept).tensors(), before.rows(kept).tensors()))


@pytest.fixture
def prompts() -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, 64, length) for i, length in enumerate(LENGTHS)]


def gpu_model(dtype: torch.dtype = torch.float32) -> Mamba2LM:
    return build(CONFIG, seed=0).to("cuda", dtype).eval()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestGraph:
    @pytest.mark.parametrize("settings", [{}, SAMPLING], ids=["likeliest", "sampled"])
    @pytest.mark.parametrize("name", MITIGATIONS)
    def test_a_graph_makes_what_the_eager_step_makes(
        self, name: str, settings: dict[str, Any], prompts: list[np.ndarray], check_close: Any
    ) -> None:
        model, mitigation = gpu_model(), MITIGATIONS[name]
        results = [
            model.generate(prompts, max_new_tokens=30, mitigation=mitigation, cuda_graph=graph, **settings)
            for graph in (True, False)
        ]
        assert results[0].tokens == results[1].tokens
        check_states(results[0].state, results[1].state, check_close)

    def test_a_graph_is_the_default_and_makes_what_the_cpu_makes(self, prompts: list[np.ndarray]) -> None:
        assert gpu_model().generate(prompts, max_new_tokens=20).tokens == (
            build(CONFIG, seed=0).eval().generate(prompts, max_new_tokens=20).tokens
        )

    @pytest.mark.parametrize("name", MITIGATIONS)
    def test_the_capture_leaves_the_state_as_it_was_and_rows_stay(self, name: str) -> None:
        model, rules = gpu_model(), for_layers(MITIGATIONS[name], 2)
        with torch.no_grad():
            before = model(torch.randint(64, (3, 9), device="cuda"), mitigation=rules).state
        step = CapturedStep(model, before, rules, Sampler(DecodingConfig(), 64))
        assert all(map(torch.equal, step.state.tensors(), before.tensors()))
        active = torch.tensor([True, False, True])
        for _ in range(4):
            step(torch.tensor([1, 2, 3]), active, torch.rand(3).double())
        kept = torch.tensor([1], device="cuda")
        assert all(map(torch.equal, step.state.rows(kept).tensors(), before.rows(kept).tensors()))
        assert step.state.position.tolist() == [13, 9, 13]

    def test_bf16(self, prompts: list[np.ndarray], check_close: Any) -> None:
        model = gpu_model(torch.bfloat16)
        results = [model.generate(prompts, max_new_tokens=20, cuda_graph=graph) for graph in (True, False)]
        assert results[0].tokens == results[1].tokens

    def test_what_cannot_be_captured_is_an_error(
        self, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        choose = Step.choose

        def asking(self: Step, hidden: Tensor, uniforms: Tensor) -> Tensor:
            chosen = choose(self, hidden, uniforms)
            chosen.tolist()
            return chosen

        monkeypatch.setattr(Step, "choose", asking)
        with pytest.raises(
            ValueError, match=r"^cuda_graph=None: the step cannot be captured .*set cuda_graph"
        ):
            gpu_model().generate(prompts)
        assert len(gpu_model().generate(prompts, max_new_tokens=2, cuda_graph=False).tokens[0]) == 2

"""AdamW's states between a checkpoint, whole and by parameter, and the shares that ZeRO's ranks hold.

A checkpoint holds what `torch.optim.AdamW.state_dict` returns, whatever strategy wrote it. Tensors are
gathered one at a time and kept on rank 0 alone, in CPU memory.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.optim import full_shape

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroStates:
    """The optimizer of a DeepSpeed engine, seen as the AdamW that it shards."""

    def __init__(self, engine: Any, module: nn.Module, sharded_parameters: bool) -> None:
        self.zero, self.sharded_parameters = engine.optimizer, sharded_parameters
        self.stage = int(engine.zero_optimization_stage())
        self.base: torch.optim.AdamW = self.zero.optimizer
        named = {name.removeprefix("model."): p for name, p in module.named_parameters()}
        self.groups = [[named[name] for name in group["param_names"]] for group in self.base.param_groups]

    def flat(self) -> list[Tensor]:
        """This rank's share of the parameters, as AdamW steps them: one tensor a group or more."""
        if self.sharded_parameters:
            return list(self.zero.fp32_partitioned_groups_flat)
        return list(self.zero.single_partition_of_fp32_groups)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's name and what this rank holds of its gradient, averaged over ranks: between the
        backward pass and the step."""
        for parameters, group in zip(self.groups, self.base.param_groups, strict=True):
            for name, parameter in zip(group["param_names"], parameters, strict=True):
                yield name, self._gradient(parameter)

    def _gradient(self, parameter: Any) -> Tensor:
        from deepspeed.utils import safe_get_local_grad

        if self.sharded_parameters:
            return safe_get_local_grad(parameter)
        if parameter._hp_mapping is None:  # all of it belongs to other ranks
            return torch.empty(0, device=parameter.device)
        return parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)

    def gather(self, keep: bool) -> dict[str, Any]:
        """AdamW's state_dict; all ranks call this together, those that do not `keep` it get it empty."""
        from deepspeed.utils import safe_get_full_optimizer_state

        groups, states, number = [], {}, 0
        steps = [self.base.state[flat]["step"] for flat in self.flat() if self.base.state.get(flat)]
        if steps:
            self._link()
        for parameters, group in zip(self.groups, self.base.param_groups, strict=True):
            indices = list(range(number, number + len(parameters)))
            number += len(parameters)
            groups.append({**group, "params": indices})
            for index, parameter in zip(indices, parameters, strict=True) if steps else ():
                full = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
                if keep:
                    shape = full_shape(parameter)
                    moments = {key: value.cpu().reshape(shape).clone() for key, value in full.items()}
                    states[index] = {"step": steps[0].cpu().clone(), **moments}
        return {"state": states, "param_groups": groups}

    def scatter(self, saved: dict[str, Any]) -> None:
        """Take up an AdamW's state_dict, from whatever strategy and number of ranks; each rank its share."""
        if saved["state"]:
            step = torch.as_tensor(saved["state"][0]["step"], dtype=torch.float32)
            for flat in self.flat():
                zeros = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
                self.base.state[flat] = {"step": step.clone().to(flat.device), **zeros}
            self._link()
        for parameters, group, theirs in zip(
            self.groups, self.base.param_groups, saved["param_groups"], strict=True
        ):
            group.update({k: v for k, v in theirs.items() if k not in ("params", "param_names")})
            for index, parameter in zip(theirs["params"], parameters, strict=True) if saved["state"] else ():
                for key in MOMENTS:
                    self._set(parameter, saved["state"][index][key], key)

    def dtypes(self, module: nn.Module) -> list[tuple[str, int, torch.dtype]]:
        """(name, elements, dtype) of the parameters by kind, and of the shares that AdamW steps."""
        counts: Counter[tuple[str, torch.dtype]] = Counter()
        for name, parameter in module.named_parameters():
            kind = re.sub(r"\.\d+\.", ".*.", name.removeprefix("model."))
            counts[kind, parameter.dtype] += full_shape(parameter).numel()
        rows = [(name, count, dtype) for (name, dtype), count in counts.items()]
        return rows + [("this rank's share, as AdamW steps it", t.numel(), t.dtype) for t in self.flat()]

    def _link(self) -> None:
        """Let DeepSpeed find each parameter's part in the shares' moments. By itself it does so once, after
        the first group's step: the second group has none then."""
        if not self.sharded_parameters:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: nn.Parameter, value: Tensor, key: str) -> None:
        from deepspeed.utils import (
            safe_get_local_optimizer_state,
            safe_set_full_optimizer_state,
            safe_set_local_optimizer_state,
        )

        if not self.sharded_parameters:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        # Stage 3 splits every parameter by itself, the last share padded.
        size = safe_get_local_optimizer_state(parameter, key).numel()
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        padded = F.pad(value.flatten(), (0, size * world_size - value.numel()))
        safe_set_local_optimizer_state(parameter, padded[rank * size : (rank + 1) * size], key)


def full_weights(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The module's state_dict with whole parameters; all ranks call this together."""
    if not any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        return module.state_dict()
    import deepspeed

    weights: dict[str, Tensor] = {}
    done: dict[int, Tensor] = {}  # tied parameters stay tied
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) not in done:
            with deepspeed.zero.GatheredParameters([parameter]):
                done[id(parameter)] = parameter.detach().cpu().clone() if keep else torch.empty(0)
        weights[name] = done[id(parameter)]
    return weights

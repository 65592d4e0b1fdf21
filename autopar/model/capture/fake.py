"""Stand-ins for tensors: same shapes, strides and types, no memory. To be made inside a FakeTensorMode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from autopar.model.capture.kernels import Storages
from autopar.model.capture.records import TracedParameter


def fake_values(values: Any, device: torch.device) -> Any:
    """Nested values with stand-ins for their tensors."""

    def convert(tensor: Tensor) -> Tensor:
        made = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=device)
        return made.requires_grad_(tensor.requires_grad)

    return tree_map_only(Tensor, convert, values)


def fake_state(module: nn.Module, storages: Storages) -> tuple[dict[str, Tensor], dict[int, TracedParameter]]:
    """Stand-ins for parameters and buffers, tied ones tied; meta tensors stand on the CPU."""
    made: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    names: dict[int, list[str]] = {}
    for group in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, tensor in group:
            if id(tensor) not in made:
                made[id(tensor)] = fake_values(
                    tensor.detach(), torch.device("cpu") if tensor.is_meta else tensor.device
                )
                made[id(tensor)].requires_grad_(tensor.requires_grad)
            state[name] = made[id(tensor)]
            if isinstance(tensor, nn.Parameter):
                names.setdefault(storages.number(state[name]), []).append(name)
    shapes = {storages.number(tensor): tuple(tensor.shape) for tensor in state.values()}
    return state, {s: TracedParameter(names=tuple(n), shape=shapes[s]) for s, n in names.items()}

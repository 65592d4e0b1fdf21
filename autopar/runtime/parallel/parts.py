"""A module as a chain of parts: what comes before the repeated blocks, the blocks, and what comes after."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autopar.errors import PlanError
from autopar.plan import Plan
from autopar.runtime.parallel.gradients import add_nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Names of submodules.

    Attributes:
        first, blocks, last: in the order of the forward pass.
        chained: calling all of them one after another is the forward pass, so that a pipeline may cut between them.
    """

    first: tuple[str, ...]
    blocks: tuple[str, ...]
    last: tuple[str, ...]
    chained: bool

    def stages(self, plan: Plan) -> tuple[tuple[str, ...], ...]:
        """Names of the parts of every virtual stage, in the order of the model. Raises PlanError."""
        if plan.num_stages > len(self.blocks) and not plan.stage_blocks:
            raise PlanError(f"plan {plan.slug}: {plan.num_stages} stages for a model of {len(self.blocks)} blocks")
        counts = plan.blocks_of_stages(len(self.blocks))
        if sum(counts) != len(self.blocks):
            raise PlanError(f"plan {plan.slug}: stage_blocks adds up to {sum(counts)} of {len(self.blocks)} blocks")
        ends = [sum(counts[: stage + 1]) for stage in range(len(counts))]
        stages = [self.blocks[end - count : end] for end, count in zip(ends, counts, strict=True)]
        stages[0] = self.first + stages[0]
        stages[-1] = stages[-1] + self.last
        if () in stages:
            raise PlanError(
                f"plan {plan.slug} leaves stage {stages.index(())} empty: the model has no part there beside its blocks"
            )
        return tuple(stages)


def find_parts(module: nn.Module) -> Parts:
    """Parts that a module declares by ``pipeline_parts() -> (first, blocks, last)``, or that it plainly has.

    Without a declaration the children of an ``nn.Sequential`` are its blocks; of any other module, the longest
    ``nn.ModuleList`` gives blocks that can be sharded one by one, but not cut into pipeline stages.
    """
    declared = getattr(module, "pipeline_parts", None)
    if declared is not None:
        first, blocks, last = declared()
        return Parts(first=tuple(first), blocks=tuple(blocks), last=tuple(last), chained=True)
    if isinstance(module, nn.Sequential):
        return Parts(first=(), blocks=tuple(name for name, _ in module.named_children()), last=(), chained=True)
    lists = [(name, child) for name, child in module.named_modules() if isinstance(child, nn.ModuleList)]
    if not lists:
        return Parts(first=(), blocks=(), last=(), chained=False)
    name, longest = max(lists, key=lambda item: len(item[1]))
    return Parts(first=(), blocks=tuple(f"{name}.{i}" for i in range(len(longest))), last=(), chained=False)


class Chain(nn.Module):
    """Some parts of a module, called one after another, under the names that they have in the whole."""

    def __init__(self, whole: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.part_names = tuple(names)
        for name in self.part_names:
            *path, leaf = name.split(".")
            parent: nn.Module = self
            for component in path:
                if component not in parent._modules:
                    parent.add_module(component, nn.Module())
                parent = parent.get_submodule(component)
            parent.add_module(leaf, whole.get_submodule(name))

    def forward(self, *inputs: Any) -> Any:
        """Pass an input through the parts. Without one, a scalar zero that depends on all parameters: see gradients."""
        if not inputs:
            return add_nothing(tuple(self.parameters()))
        (x,) = inputs
        for name in self.part_names:
            x = self.get_submodule(name)(x)
        return x


def skeleton(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device, without any values. The module is not touched."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)


def boundaries(chains: Iterable[nn.Module], microbatch: Tensor) -> tuple[Tensor, ...]:
    """Inputs of every chain of a skeleton and the last one's output, as meta tensors; no value is read."""
    x = torch.empty_like(microbatch, device="meta")
    found = [x]
    with torch.no_grad():
        for chain in chains:
            x = chain(x)
            found.append(x)
    return tuple(found)

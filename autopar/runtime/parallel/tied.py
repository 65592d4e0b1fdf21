"""Parameters that several pipeline stages share, such as an embedding that is also the head's weight.

Every stage has a copy of its own, equal from the start. After a step the gradients of all copies are added up, as
Megatron does over its embedding group, so that equal updates keep the copies equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autopar.plan import Plan
from autopar.runtime.parallel.mesh import EMBEDDING_AXIS
from autopar.runtime.parallel.pipeline import rank_of
from autopar.runtime.parallel.tensor_parallel import local_tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Tie:
    """A parameter that is on several stages.

    Attributes:
        names: all its names in the whole model.
        pp_ranks: pipeline ranks that have it, in order.
    """

    names: frozenset[str]
    pp_ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tied:
    """A rank's copies of a parameter, and the group of the ranks that have more; None if it has all of them."""

    parameters: tuple[nn.Parameter, ...]
    group: dist.ProcessGroup | None


def find_ties(module: nn.Module, stages: Sequence[Sequence[str]], plan: Plan) -> tuple[Tie, ...]:
    """Parameters that the parts of more than one stage have.

    Args:
        module: the whole model.
        stages: names of the parts of every virtual stage.
        plan: tells where stages live.
    """
    names: dict[int, set[str]] = {}
    where: dict[int, set[int]] = {}
    for stage, parts in enumerate(stages):
        for part in parts:
            for name, parameter in module.get_submodule(part).named_parameters(part, remove_duplicate=False):
                names.setdefault(id(parameter), set()).add(name)
                where.setdefault(id(parameter), set()).add(stage)
    return tuple(
        Tie(names=frozenset(names[key]), pp_ranks=tuple(sorted({rank_of(plan, stage) for stage in found})))
        for key, found in where.items()
        if len(found) > 1
    )


def separate_copies(chains: Iterable[nn.Module]) -> None:
    """Give stages of the same rank copies of their own of what they share."""
    seen: set[int] = set()
    for chain in chains:
        copies: dict[int, nn.Parameter] = {}
        for module in chain.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in seen:
                    copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                    setattr(module, name, copies.setdefault(id(parameter), copy))
        seen |= {id(parameter) for parameter in chain.parameters()}


def join_ties(
    ties: Iterable[Tie], owned: Iterable[tuple[str, nn.Parameter]], mesh: DeviceMesh | None
) -> tuple[Tied, ...]:
    """This rank's copies of shared parameters. Ranks that share one call it at the same time: they make a group.

    Args:
        ties: of the whole model.
        owned: this rank's parameters by name.
        mesh: of the layout.
    """
    mine, found = tuple(owned), []
    for tie in ties:
        parameters = tuple(parameter for name, parameter in mine if name in tie.names)
        if not parameters:
            continue
        assert mesh is not None
        pipeline = dist.get_process_group_ranks(mesh.get_group("pp"))
        ranks, group = [pipeline[rank] for rank in tie.pp_ranks], None
        if len(ranks) > 1:
            group = dist.new_group(ranks, use_local_synchronization=True, group_desc=EMBEDDING_AXIS)
        found.append(Tied(parameters=parameters, group=group))
    return tuple(found)


def sum_tied(tied: Iterable[Tied]) -> None:
    """Add up the gradients of all copies of each shared parameter."""
    for shared in tied:
        total, *others = [local_tensor(p.grad) for p in shared.parameters if p.grad is not None]
        for gradient in others:
            total.add_(gradient)
        if shared.group is not None and total.numel():
            dist.all_reduce(total, group=shared.group)
        for gradient in others:
            gradient.copy_(total)

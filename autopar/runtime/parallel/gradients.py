"""Reducing gradients that were accumulated without it, by the reducers of DDP and of FSDP2, when one wants.

Both reduce by hooks of a backward pass. In a pipeline the last backward of a stage may be the wrong place: gradients of
weights are taken apart, without hooks, and the gradient of the input should be on its way before a reduction. Then a
backward pass that adds nothing calls the hooks. It starts from the module, called without input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel


class _AddNothing(torch.autograd.Function):
    """A scalar of some parameters whose backward leaves their gradients as they are, but runs their hooks."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.num_parameters = len(parameters)
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (None,) * ctx.num_parameters


def add_nothing(parameters: Sequence[nn.Parameter]) -> Tensor:
    """A scalar zero whose backward pass gives every parameter an undefined gradient."""
    result: Tensor = _AddNothing.apply(*parameters)  # type: ignore[no-untyped-call]
    return result


def add_nothing_in_turn(parameters: Sequence[nn.Parameter]) -> Tensor:
    """As ``add_nothing``, with the hooks run from the last parameter to the first.

    That is the order of a backward pass, in which DDP fills its buckets. Nodes made later run earlier in autograd,
    while the order among the inputs of one node is not defined.
    """
    return torch.stack([add_nothing([parameter]) for parameter in parameters]).sum()


def expect_reduction(module: nn.Module) -> None:
    """The backward pass that comes next reduces the gradients (FSDP2 is told by ``accumulating``)."""
    if isinstance(module, DistributedDataParallel):
        module()


def reduce_accumulated(module: nn.Module, parameters: Sequence[nn.Parameter], *, keep_gathered: bool) -> None:
    """Reduce what ``.grad`` holds over the data parallel ranks. Nothing for a module that is not data parallel.

    Args:
        module: of DDP or FSDP2, that may be called without input and then returns ``add_nothing`` of its parameters.
        parameters: of DDP, as its reducer knows them.
        keep_gathered: of FSDP2, whether forward leaves the weights gathered (ZeRO stages 1 and 2).
    """
    if isinstance(module, DistributedDataParallel):
        expect_reduction(module)
        add_nothing_in_turn(parameters).backward()  # type: ignore[no-untyped-call]
    elif isinstance(module, FSDPModule):
        sharded = cast(FSDPModule, module)
        sharded.set_requires_gradient_sync(True)
        sharded.set_reshard_after_backward(True)
        # This forward must not release the weights of the root: its backward would gather them once more.
        sharded.set_reshard_after_forward(False, recurse=False)
        module().backward()
        sharded.set_reshard_after_forward(not keep_gathered, recurse=False)

"""bf16 compute over fp32 weights: what forward and backward see is a narrow copy, what the optimizer sees is not.

Sharded weights are cast by FSDP2 as it gathers them. All others are cast once per step, at their first use; the copy
serves every microbatch of the step. Autograd casts their gradients back, so that they add up over microbatches and are
reduced over ranks in the weights' own type. Activations, and with them what tensor, context and pipeline parallel ranks
send each other, have the narrow type; the loss is computed in fp32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.utils import parametrize

_PARAMETRIZED = re.compile(r"parametrizations\.(\w+)\.original$")


class Cast(nn.Module):
    """From a weight to its copy in another type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        """The copy; its gradient is cast back."""
        return weight.to(self.dtype)


def cast_when_used(module: nn.Module, dtype: torch.dtype, only: Iterable[nn.Parameter] | None = None) -> None:
    """Let a module compute with copies of its floating-point parameters, or of some of them, in another type.

    The parameters stay the same objects, under the names that ``plain_name`` turns back.
    """
    wanted = None if only is None else {id(parameter) for parameter in only}
    cast = Cast(dtype)
    for child in list(module.modules()):
        for name, parameter in list(child.named_parameters(recurse=False)):
            chosen = wanted is None or id(parameter) in wanted
            if chosen and parameter.is_floating_point() and parameter.dtype != dtype:
                parametrize.register_parametrization(child, name, cast, unsafe=True)


def plain_name(name: str) -> str:
    """The name that a parameter had before ``cast_when_used``."""
    return _PARAMETRIZED.sub(r"\1", name)


def casting_once(dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """Within it every weight is cast at most once."""
    return nullcontext() if dtype is None else parametrize.cached()


def gathered_in(dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    """For ``fully_shard``: gather in a type, reduce gradients in fp32."""
    return (
        MixedPrecisionPolicy() if dtype is None else MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    )


def in_fp32(loss_fn: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss function that takes narrow outputs and computes in fp32."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return loss_fn(outputs.to(torch.float32), targets)

    return loss


def narrowed(inputs: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Floating-point inputs in the type of compute; others as they are."""
    return inputs.to(dtype) if dtype is not None and inputs.is_floating_point() else inputs

"""Losses and gradients that are no numbers: found before the optimizer uses them, and traced to where they come from.

A step looks at two scalars. Only when one of them is not finite does every rank go through the same batch once more,
with hooks on all modules, and the ranks compare what they saw first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from autopar.errors import RunError
from autopar.runtime.parallel.parallel_model import ParallelModel
from autopar.runtime.parallel.pipeline import stages_of_rank
from autopar.runtime.parallel.tensor_parallel import local_tensor

WEIGHTS, FORWARD, BACKWARD, GRADIENTS = "weights", "forward", "backward", "gradients"
_PARAMETRIZATION = re.compile(r"\.?parametrizations\.(\w+).*$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a rank saw first that is not finite.

    Attributes:
        phase: weights (before the step), forward, backward, or gradients (only after they were reduced).
        order: findings of one phase by it: the smaller comes first in a pipeline, then in time.
        name: of the module or parameter.
    """

    rank: int
    phase: str
    order: tuple[int, int]
    name: str

    @property
    def key(self) -> tuple[int, int, int]:
        """Smaller for what comes first."""
        return ((WEIGHTS, FORWARD, BACKWARD, GRADIENTS).index(self.phase), *self.order)

    @property
    def place(self) -> str:
        """For people."""
        where = {WEIGHTS: "the weight", FORWARD: "the output of", BACKWARD: "the gradient of the output of"}
        return f"{where.get(self.phase, 'the gradient of')} {self.name}"


def check_numbers(model: ParallelModel, step: int, loss: Tensor, norm: Tensor, inputs: Tensor, targets: Tensor) -> None:
    """Raise unless loss and gradient norm of a step are finite. Every rank calls it before the optimizer.

    Args:
        model: whose gradients they are; if they are bad, its gradients are made anew.
        step: named in the error.
        loss: of this rank's share.
        norm: of the whole gradient, equal on all ranks.
        inputs, targets: of ``train_step``.

    Raises:
        RunError: with the ranks and the module or parameter where it began.
    """
    loss_value, norm_value = torch.stack((loss.detach().float(), norm.float())).tolist()
    if math.isfinite(norm_value):
        if not math.isfinite(loss_value):
            raise RunError(
                f"step {step}: the loss is {loss_value} on rank {_rank()}, though the gradients are finite: look at "
                "the loss function and this batch's targets"
            )
        return
    raise RunError(f"step {step}: the gradient norm is {norm_value}. {explain(trace(model, inputs, targets))}")


def explain(findings: Iterable[Finding]) -> str:
    """A sentence about the first of all findings, and the ranks that made it."""
    found = sorted(findings, key=lambda finding: (finding.key, finding.rank))
    if not found:
        return (
            "It did not happen again when the batch was computed once more: the sum of all squares may be too large "
            "for fp32, or a device computes wrongly"
        )
    first = found[0]
    ranks = [finding.rank for finding in found if finding.key == first.key and finding.name == first.name]
    where = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    advice = {
        WEIGHTS: "an earlier step or the checkpoint was bad: go back to the checkpoint before",
        GRADIENTS: "it became so when gradients were reduced: their sum is too large for their type",
    }.get(first.phase, "lower the learning rate or clip harder, or leave out this batch")
    return f"First not finite is {first.place}, on {where}; {advice}"


def trace(model: ParallelModel, inputs: Tensor, targets: Tensor) -> tuple[Finding, ...]:
    """Compute a batch once more under hooks; what every rank saw first. Collective; gradients are made anew."""
    mine = _bad_weight(model)
    for parameter in model.parameters():
        parameter.grad = None
    seen: list[Finding] = []
    with _watched(model, seen):
        model.train_step(inputs, targets)
    mine = mine or min(seen, key=lambda finding: finding.key, default=None) or _bad_gradient(model)
    everyone: list[Finding | None] = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    return tuple(finding for finding in everyone if finding is not None)


def _bad_weight(model: ParallelModel) -> Finding | None:
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if not _finite(parameter):
            return Finding(rank=_rank(), phase=WEIGHTS, order=(_first_stage(model), index), name=name)
    return None


def _bad_gradient(model: ParallelModel) -> Finding | None:
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.grad is not None and not _finite(parameter.grad):
            return Finding(rank=_rank(), phase=GRADIENTS, order=(_first_stage(model), index), name=name)
    return None


@dataclass(slots=True)
class _Watch:
    """Notes outputs of modules, and gradients of them, that are not finite."""

    seen: list[Finding]
    _handles: list[Any] = field(default_factory=list)

    def add(self, module: nn.Module, name: str, stage: int) -> None:
        self._handles.append(module.register_forward_hook(lambda _, __, output: self._look(output, name, stage)))

    def _look(self, output: Any, name: str, stage: int) -> None:
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self._note(tensor, FORWARD, name, stage)
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._note(gradient, BACKWARD, name, -stage))

    def _note(self, tensor: Tensor, phase: str, name: str, stage: int) -> None:
        if not _finite(tensor):
            self.seen.append(Finding(rank=_rank(), phase=phase, order=(stage, len(self.seen)), name=name))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@contextmanager
def _watched(model: ParallelModel, seen: list[Finding]) -> Iterator[None]:
    watch = _Watch(seen)
    for stage, wrapped in zip(_stages(model), model.modules, strict=True):
        module = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
        for name, child in module.named_modules():
            if name:
                watch.add(child, _PARAMETRIZATION.sub(r".\1", name), stage)
    try:
        yield
    finally:
        watch.remove()


def _stages(model: ParallelModel) -> tuple[int, ...]:
    if model.plan.layout.pp == 1 or model.mesh is None:
        return (0,)
    return stages_of_rank(model.plan, model.mesh.get_local_rank("pp"))


def _first_stage(model: ParallelModel) -> int:
    return min(_stages(model))


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(local_tensor(tensor.detach())).all())


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0

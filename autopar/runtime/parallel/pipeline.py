"""Pipeline parallelism by torch.distributed.pipelining: a plan's schedule as data, run action by action.

The actions are those of ``autopar.schedule``, which the simulation prices. PyTorch's runtime adds what goes between
ranks. Gradients are reduced over the data parallel ranks once, after a stage's last backward: on the first stage, whose
last backward ends the step, during it; on the others when the gradient of the input is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel

from autopar.plan import V_SCHEDULES, Plan
from autopar.runtime.parallel.data_parallel import accumulating
from autopar.runtime.parallel.gradients import expect_reduction, reduce_accumulated
from autopar.runtime.private import pipeline_runtime
from autopar.schedule.actions import build_steps
from autopar.schedule.notation import rank_of_stage

LossFn = Callable[[Tensor, Tensor], Tensor]


class Observer(Protocol):
    """Told of each action such as ``2F0`` (stage 2, forward, microbatch 0) as it begins and ends."""

    def begin(self, action: str) -> None:
        """An action begins."""

    def end(self, action: str) -> None:
        """The action that began last ends."""


class Unobserved:
    """An observer that does nothing."""

    def begin(self, action: str) -> None:
        """Ignore it."""

    def end(self, action: str) -> None:
        """Ignore it."""


@contextmanager
def observed(observer: Observer, action: str) -> Iterator[None]:
    """Report an action to an observer."""
    observer.begin(action)
    yield
    observer.end(action)


class _StageModule(nn.Module):
    """A stage's module as PyTorch's pipelining is to see it: nothing of how it is replicated or sharded.

    Otherwise pipelining would take a hand in reducing gradients, which is wrong for sharded weights that are released
    after forward: it looks for the weights of a split backward before they are gathered, and finds none.
    """

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        # Not as a submodule, so that pipelining does not find it.
        self._hidden = [wrapped]
        # DDP over tensor parallel modules knows its parameters only until the first forward.
        self.replicated = tuple(wrapped.parameters()) if isinstance(wrapped, DistributedDataParallel) else ()

    @property
    def wrapped(self) -> nn.Module:
        """The module of DDP or FSDP2, or as it was."""
        return self._hidden[0]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters as forward uses them."""
        return iter(self.replicated) if self.replicated else self.wrapped.parameters(recurse)

    def forward(self, x: Tensor) -> Tensor:
        """Of the module."""
        result: Tensor = self.wrapped(x)
        return result


class ObservedStage(PipelineStage):
    """A stage that reports every action, without the communication between stages, and reduces its gradients once."""

    submod: _StageModule
    observer: Observer
    keep_gathered: bool
    _reduced = False

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Forward of one microbatch."""
        with (
            observed(self.observer, f"{self.stage_index}F{fwd_chunk_id}"),
            accumulating(self.submod.wrapped, last=False, keep_gathered=True),
        ):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> Any:
        """Backward of one microbatch, or the part of it that gives the gradient of the input."""
        if not (full_backward or self.is_first):
            self._gather()
        with (
            observed(self.observer, f"{self.stage_index}{'B' if full_backward else 'I'}{bwd_chunk_id}"),
            self._reducing(last_backward and full_backward and self.is_first),
        ):
            return super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> Any:
        """The other part: gradients of the weights. On the first stage, whose input needs no gradient, all of it."""
        if not self.is_first:
            self._gather()
        with (
            observed(self.observer, f"{self.stage_index}W{bwd_chunk_id}"),
            self._reducing(last_backward and self.is_first),
        ):
            return super().backward_weight_one_chunk(bwd_chunk_id, last_backward)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Reduce gradients over the data parallel ranks, if the last backward has not."""
        if not self._reduced:
            reduce_accumulated(self.submod.wrapped, self.submod.replicated, keep_gathered=self.keep_gathered)

    @contextmanager
    def _reducing(self, now: bool) -> Iterator[None]:
        self._reduced = now
        if now:
            expect_reduction(self.submod.wrapped)
        # Weights that are sharded stay whole after a backward, for the pass that follows.
        with accumulating(self.submod.wrapped, last=now, keep_gathered=True):
            yield

    def _gather(self) -> None:
        """Sharded weights in whole, which a split backward must find before it begins."""
        for module in self.submod.wrapped.modules():
            if isinstance(module, FSDPModule):
                module.unshard()


def stages_of_rank(plan: Plan, pp_rank: int) -> tuple[int, ...]:
    """Virtual stages of a pipeline rank, in the order of the model."""
    return tuple(stage for stage in range(plan.num_stages) if rank_of(plan, stage) == pp_rank)


def rank_of(plan: Plan, stage: int) -> int:
    """Pipeline rank of a virtual stage."""
    return rank_of_stage(stage, plan.layout.pp, plan.schedule in V_SCHEDULES)


def build_schedule(
    plan: Plan,
    modules: Sequence[nn.Module],
    boundaries: Sequence[Tensor],
    *,
    num_microbatches: int,
    loss_fn: LossFn,
    device: torch.device,
    group: dist.ProcessGroup,
    observer: Observer,
) -> Any:
    """The schedule of this rank's stages, for microbatches of one shape.

    Args:
        plan: tells stages and schedule.
        modules: of this rank's virtual stages, in the order of the model.
        boundaries: meta tensors, the input of every virtual stage of the model and the output of the last, as this
            rank's tensor parallel coordinate sees them.
        num_microbatches: per step.
        loss_fn: of one microbatch; its gradients are summed over microbatches as they are.
        device: where to compute.
        group: the ranks of this pipeline.
        observer: told of every action.
    """
    stages: list[ObservedStage] = []
    for index, module in zip(stages_of_rank(plan, dist.get_rank(group)), modules, strict=True):
        stage = ObservedStage(
            _StageModule(module), index, plan.num_stages, device,
            input_args=_example(boundaries[index]), output_args=_example(boundaries[index + 1]), group=group,
        )  # fmt: skip
        stage.observer, stage.keep_gathered = observer, plan.zero_stage < 3
        stages.append(stage)
    steps = build_steps(plan.schedule, plan.layout.pp, num_microbatches, plan.layout.vp)
    return pipeline_runtime(stages, [[str(step) for step in row] for row in steps], num_microbatches, loss_fn)


def _example(boundary: Tensor) -> Tensor:
    return torch.empty(boundary.shape, dtype=boundary.dtype, device="meta").requires_grad_(boundary.is_floating_point())

"""Pipeline parallelism by torch.distributed.pipelining: stages that report their actions, and a plan's schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from autopar.plan import Plan, ScheduleName

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


class ObservedStage(PipelineStage):
    """A stage that reports the forward and backward of every microbatch, without the communication around them."""

    observer: Observer

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Forward of one microbatch."""
        with observed(self.observer, f"{self.stage_index}F{fwd_chunk_id}"):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Backward of one microbatch."""
        with observed(self.observer, f"{self.stage_index}B{bwd_chunk_id}"):
            return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)


def local_stages(plan: Plan, pp_rank: int) -> tuple[int, ...]:
    """Virtual stages of a pipeline rank: every pp-th one."""
    return tuple(range(pp_rank, plan.num_stages, plan.layout.pp))


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
    stages: list[Any] = []
    for index, module in zip(local_stages(plan, dist.get_rank(group)), modules, strict=True):
        stage = ObservedStage(
            module, index, plan.num_stages, device,
            input_args=_example(boundaries[index]), output_args=_example(boundaries[index + 1]), group=group,
        )  # fmt: skip
        stage.observer = observer
        stages.append(stage)
    arguments: dict[str, Any] = {"loss_fn": loss_fn, "scale_grads": False}
    if plan.schedule is ScheduleName.INTERLEAVED:
        return ScheduleInterleaved1F1B(stages, num_microbatches, **arguments)
    kind = ScheduleGPipe if plan.schedule is ScheduleName.GPIPE else Schedule1F1B
    return kind(stages[0], num_microbatches, **arguments)


def _example(boundary: Tensor) -> Tensor:
    return torch.empty(boundary.shape, dtype=boundary.dtype, device="meta").requires_grad_(boundary.is_floating_point())

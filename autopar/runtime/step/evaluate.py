"""The loss of a model under its plan without training it: forward passes only, by the same modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from autopar.runtime.parallel.parallel_model import ParallelModel
from autopar.runtime.parallel.pipeline import rank_of, stages_of_rank
from autopar.runtime.parallel.precision import casting_once, narrowed


@torch.no_grad()
def evaluate(model: ParallelModel, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean loss over batches, the same on every rank.

    Args:
        model: under any plan.
        batches: inputs and targets of this data parallel rank's shares, each [local batch, seq_len] on its device; as
            many on every rank, and each as large as a training step's share.
    """
    with _evaluating(model), casting_once(model.cast_dtype), model.loss_context():
        losses = [forward_loss(model, inputs, targets) for inputs, targets in batches]
    mean = torch.stack(losses).mean()
    # Every rank of a pipeline and tensor parallel group has the same loss: the mean of all is that over the data.
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()


def forward_loss(model: ParallelModel, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of this data parallel rank's sequences, on every rank that shares them: fp32 scalar.

    Arguments as in ``ParallelModel.train_step``.
    """
    inputs = model.local_tokens(narrowed(inputs, model.compute_dtype))
    targets = model.local_tokens(targets)
    loss = _microbatch_losses(model, inputs, targets)
    if model.context is not None:
        dist.all_reduce(loss, dist.ReduceOp.AVG, group=model.context.group)
    return loss


def _microbatch_losses(model: ParallelModel, inputs: Tensor, targets: Tensor) -> Tensor:
    microbatches = list(zip(inputs.chunk(model.num_microbatches), targets.chunk(model.num_microbatches), strict=True))
    if model.plan.layout.pp == 1:
        losses = [model.loss_of(model.modules[0](batch), wanted) for batch, wanted in microbatches]
        return torch.stack(losses).mean().float()
    return _pipeline_loss(model, microbatches)


def _pipeline_loss(model: ParallelModel, microbatches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Microbatch after microbatch through all stages; ranks work at different microbatches at the same time."""
    assert model.mesh is not None
    group, pp_rank, plan = model.mesh.get_group("pp"), model.mesh.get_local_rank("pp"), model.plan
    owner = {stage: rank_of(plan, stage) for stage in range(plan.num_stages)}
    mine, last = dict(zip(stages_of_rank(plan, pp_rank), model.modules, strict=True)), plan.num_stages - 1
    shapes = model.boundaries(microbatches[0][0])
    total = torch.zeros((), device=model.device)
    for batch, wanted in microbatches:
        stream = batch.contiguous()
        for stage, module in mine.items():
            if stage and owner[stage - 1] != pp_rank:
                stream = torch.empty(shapes[stage].shape, dtype=shapes[stage].dtype, device=model.device)
                dist.recv(stream, group=group, group_src=owner[stage - 1])
            stream = module(stream)
            if stage == last:
                total += model.loss_of(stream, wanted).float()
            elif owner[stage + 1] != pp_rank:
                dist.send(stream.contiguous(), group=group, group_dst=owner[stage + 1])
    total /= len(microbatches)
    dist.broadcast(total, group=group, group_src=owner[last])
    return total


@contextmanager
def _evaluating(model: ParallelModel) -> Iterator[None]:
    for module in model.modules:
        module.eval()
    yield
    for module in model.modules:
        module.train()
        # Weights that were gathered for a forward without a backward would stay, and be out of date after the next
        # step of the optimizer.
        for child in module.modules():
            if isinstance(child, FSDPModule):
                child.reshard()

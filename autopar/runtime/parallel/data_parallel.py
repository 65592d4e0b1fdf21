"""Data parallelism: DDP for replicas, FSDP2 for every ZeRO stage; gradients are reduced once per step.

ZeRO-1 divides the optimizer state alone. Of PyTorch's two ways to that, ZeroRedundancyOptimizer behind DDP reduces
whole gradients to every rank and then broadcasts whole parameters; ``fully_shard`` scatters the gradients once and
gathers the parameters once, two thirds of the traffic and the number that ZeRO counts, and composes with every other
axis. So stages 1 and 2 run alike: parameters are whole from the first forward to the last backward and gradients until
that backward, and both are let go as soon as nothing needs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from autopar.plan import Plan
from autopar.runtime.parallel.expert_parallel import ExpertRanks, shard_experts
from autopar.runtime.parallel.mesh import data_mesh
from autopar.runtime.parallel.precision import cast_when_used, gathered_in
from autopar.runtime.private import ignore_in_ddp


def replicate_or_shard(
    module: nn.Module,
    mesh: DeviceMesh | None,
    plan: Plan,
    blocks: Iterable[str],
    experts: ExpertRanks | None = None,
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Wrap a module (the whole model or a stage) for the ranks of ``data_mesh``; without any, return it as it is.

    ZeRO stage 0 is DDP. The others are ``fully_shard`` of each block and then of the rest; stages 1 and 2 keep gathered
    parameters from forward to backward, stage 3 gathers them again. Two axes make hybrid sharding.

    Args:
        module: in its place on the device, divided over tensor parallel ranks if it is to be.
        mesh: of the whole layout.
        plan: tells the ZeRO stage.
        blocks: names of submodules that are sharded one by one, those that ``module`` has.
        experts: if their ranks are others; those that are not sharded here are left to ``reduce_experts``.
        compute_dtype: of forward and backward, if it is not that of the parameters.
    """
    ranks, policy, reshard = data_mesh(mesh), gathered_in(compute_dtype), plan.zero_stage == 3
    left = {p for name, p in module.named_parameters() if experts is not None and name in experts.names}
    sharding = ranks is not None and plan.zero_stage > 0
    if sharding and experts is not None and experts.sharded:
        shard_experts(module, experts, reshard=reshard, policy=policy)
        left = set()
    if compute_dtype is not None:
        cast_when_used(module, compute_dtype, only=left if sharding else None)
    if ranks is None:
        return module
    if not sharding:
        ignore_in_ddp(module, (name for name, parameter in module.named_parameters() if parameter in left))
        return DistributedDataParallel(module, device_mesh=ranks, gradient_as_bucket_view=True, broadcast_buffers=False)
    names = {name for name, _ in module.named_modules()}
    for part in (*(module.get_submodule(name) for name in blocks if name in names), module):
        fully_shard(part, mesh=ranks, reshard_after_forward=reshard, mp_policy=policy, ignored_params=left)
    return module


@contextmanager
def accumulating(module: nn.Module, *, last: bool, keep_gathered: bool) -> Iterator[None]:
    """Forward and backward of one microbatch: gradients add up locally and are reduced in the last one's backward.

    ``keep_gathered`` leaves sharded parameters whole between microbatches (ZeRO stages 1 and 2).
    """
    if isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
        return
    if isinstance(module, FSDPModule):
        sharded = cast(FSDPModule, module)
        sharded.set_requires_gradient_sync(last)
        sharded.set_reshard_after_backward(last or not keep_gathered)
    yield

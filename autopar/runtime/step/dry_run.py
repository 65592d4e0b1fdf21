"""One rank's step of a plan of any number of ranks, in one process: the collectives that it would call.

The rank runs the code that a real one runs, on PyTorch's fake process group, which communicates with nobody. Weights
and activations have shapes alone where that is possible, so that a plan for a model that no machine here could hold is
checked in a minute; DDP and the exchange of tokens with experts look at values, and run on real ones.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.errors import InputError, RunError
from autopar.measurement import CountedCollective
from autopar.model.spec import ModelSpec
from autopar.model.transformer import build, language_model_loss
from autopar.plan import Plan
from autopar.runtime.observe.counting import count_collectives, summed
from autopar.runtime.parallel.mesh import build_mesh
from autopar.runtime.parallel.parallel_model import ParallelModel
from autopar.runtime.parallel.parallelize import parallelize
from autopar.runtime.private import fake_store, shapes_alone
from autopar.runtime.step.optimizer import build_optimizer
from autopar.runtime.step.trainer import COMPUTE_DTYPES
from autopar.runtime.support import check_supported
from autopar.workload import Workload

LEARNING_RATE = 0.0
WEIGHT_BYTES = 4
CPU, FAKE = torch.device("cpu"), "fake"
SMALL, LARGEST = 2 * 10**8, 4 * 10**9
"""Bytes of a model whose weights are real, since that is quicker, and of one whose weights may be."""


def dry_run(
    plan: Plan, spec: ModelSpec, workload: Workload, rank: int = 0, *, clip: float | None = None
) -> tuple[CountedCollective, ...]:
    """Collectives that one rank calls in a step.

    Args:
        plan: of any number of ranks.
        spec, workload: what is trained.
        rank: which one.
        clip: as in TrainJob.

    Raises:
        PlanError: the executor does not run this plan.
        InputError: its weights must be real, and are too many.
        RunError: this process is another rank; it stays the one that it was in its first dry run.
    """
    check_supported(plan, spec, plan.num_microbatches(workload))
    whole = sum(p.numel() for p in _described(spec).parameters()) * WEIGHT_BYTES
    needs_values = _looks_at_values(plan, spec)
    if needs_values and whole > LARGEST:
        raise InputError(
            f"plan {plan.slug}: DDP and experts need real weights to run dry, but {spec.name} has {whole / 1e9:.1f} GB "
            "of them: check the plan for fewer blocks of the same size"
        )
    _pretend(rank, plan.layout.world_size)
    return _run(plan, spec, workload, clip, real=needs_values or whole <= SMALL)


def _looks_at_values(plan: Plan, spec: ModelSpec) -> bool:
    layout = plan.layout
    return (plan.zero_stage == 0 and layout.dp * layout.cp > 1) or spec.num_experts > 0


def _warmup(plan: Plan) -> int:
    """Steps before the counted one: DDP settles its buckets in the second, pipelines meet in the first."""
    layout = plan.layout
    return 2 if plan.zero_stage == 0 and layout.dp * layout.cp > 1 else int(layout.pp > 1)


def _pretend(rank: int, world_size: int) -> None:
    """Be this rank for the rest of the process: DTensor remembers groups by name, so that they must stay."""
    if not dist.is_initialized():
        dist.init_process_group(FAKE, rank=rank, world_size=world_size, store=fake_store())
    elif (dist.get_backend(), dist.get_rank(), dist.get_world_size()) != (FAKE, rank, world_size):
        raise RunError(
            f"a dry run as rank {rank} of {world_size} needs a process of its own: this one is rank {dist.get_rank()} "
            f"of {dist.get_world_size()} on {dist.get_backend()}"
        )


def _described(spec: ModelSpec) -> nn.Module:
    with torch.device("meta"):
        return build(spec)


def _run(
    plan: Plan, spec: ModelSpec, workload: Workload, clip: float | None, *, real: bool
) -> tuple[CountedCollective, ...]:
    mesh = build_mesh(plan.layout, CPU.type)
    module = build(spec) if real else _described(spec)
    model = parallelize(
        module, plan, loss_fn=language_model_loss, num_microbatches=plan.num_microbatches(workload),
        device=CPU if real else torch.device("meta"), mesh=mesh,
        compute_dtype=COMPUTE_DTYPES[workload.precision],
    )  # fmt: skip
    for wrapped in model.modules:
        if isinstance(wrapped, DistributedDataParallel):
            # A lambda, since DDP refuses annotations that are text.
            wrapped.register_comm_hook(wrapped.process_group, lambda group, bucket: _reduce_bucket(group, bucket))
    with nullcontext() if real else shapes_alone(), _Received():
        if not real:
            model = _with_storage(model)
        optimizer = build_optimizer(model, workload.optimizer, learning_rate=LEARNING_RATE)
        tokens = torch.zeros((workload.global_batch // plan.layout.dp, workload.seq_len), dtype=torch.int64)

        def step() -> None:
            model.train_step(tokens, tokens)
            if clip is not None:
                model.clip_grad_norm_(clip or math.inf)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        for _ in range(_warmup(plan)):
            step()
        return summed(count_collectives(step, mesh))


def _reduce_bucket(group: dist.ProcessGroup, bucket: Any) -> torch.futures.Future[Tensor]:
    """What DDP does by itself with a bucket, but for the answer, which a fake group does not give."""
    dist.all_reduce(bucket.buffer(), group=group)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _with_storage(model: ParallelModel) -> ParallelModel:
    """The model on the CPU, as far as its tensors are anywhere."""
    for module in model.modules:
        module.to_empty(device=CPU)
    return dataclasses.replace(model, device=CPU)


class _Received(TorchDispatchMode):
    """What a fake group leaves as it was allocated has values: messages are ones, parts of others like one's own."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and give what it receives values."""
        name = func._schema.name
        if name == "aten::_local_scalar_dense" and not _has_values(args[0]):
            # Pipelining asks its neighbours whether all stages know their shapes: they do.
            return 1
        result = func(*args, **(kwargs or {}))
        if name == "c10d::recv_":
            for tensor in args[0]:
                tensor.fill_(1)
        elif name == "c10d::_allgather_base_":
            _repeat(args[1], args[0])
        elif name.endswith("::all_gather_into_tensor"):
            _repeat(args[0], result)
        elif name.endswith("::all_to_all_single"):
            result.copy_(args[0]) if result.shape == args[0].shape else result.fill_(1)
        return result


def _repeat(part: Tensor, whole: Tensor) -> None:
    whole.view(-1, part.numel()).copy_(part.flatten().clone())


def _has_values(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.device.type != "meta"

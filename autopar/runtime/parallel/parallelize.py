"""From a user's module and a plan to this rank's part of it, ready to train: ``autopar.parallelize``.

The order is fixed by how PyTorch's parts compose: cut into pipeline stages, divide products over tensor parallel
ranks, recompute, then replicate or shard over data parallel ranks, then the pipeline schedule.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autopar.errors import PlanError
from autopar.model.spec import ModelSpec
from autopar.plan import Plan
from autopar.runtime.parallel.compiled import compile_blocks
from autopar.runtime.parallel.context_parallel import ContextPart, check_parts_known, set_part
from autopar.runtime.parallel.data_parallel import replicate_or_shard
from autopar.runtime.parallel.expert_parallel import divide_experts, find_experts, order_tokens
from autopar.runtime.parallel.holdings import Cut, Runs, cuts_by_name, find_holdings, whole_model
from autopar.runtime.parallel.mesh import build_mesh, submesh
from autopar.runtime.parallel.parallel_model import ParallelModel, named_parameters
from autopar.runtime.parallel.parts import Chain, Parts, find_parts, skeleton
from autopar.runtime.parallel.pipeline import LossFn, stages_of_rank
from autopar.runtime.parallel.precision import in_fp32
from autopar.runtime.parallel.recompute import recompute
from autopar.runtime.parallel.tensor_parallel import divide
from autopar.runtime.parallel.tensor_styles import resolve_plan
from autopar.runtime.parallel.tied import Tie, find_ties, join_ties, separate_copies
from autopar.runtime.parallel.vocabulary import VOCAB
from autopar.runtime.support import check_supported, unsupported_compiled


def parallelize(
    module: nn.Module,
    plan: Plan,
    *,
    loss_fn: LossFn,
    num_microbatches: int,
    device: torch.device | str | None = None,
    tensor_parallel_plan: Mapping[str, str] | None = None,
    mesh: DeviceMesh | None = None,
    compute_dtype: torch.dtype | None = None,
    compiled: bool = False,
) -> ParallelModel:
    """Turn a module into this rank's part of it under a plan. Every rank calls it with an equal module.

    The module is changed and must not be used any more, only the result. What a module declares is used where the
    plan needs it. Declarations are attributes, of its class or set on it from outside:

    - ``pipeline_parts()``: names of the modules before, of, and after the blocks, called one after another. For
      pipelines, sequence parallelism and recomputation. An ``nn.Sequential`` needs none.
    - ``tensor_parallel_plan``: name pattern (``*`` is one path component) to style, see
      ``autopar.runtime.parallel.tensor_styles``. For tensor parallelism.
    - ``sequence_part``, of every submodule that encodes positions or attends: a ``SequencePart`` that it asks for both,
      see ``autopar.model.sequence``. For context parallelism, which puts this rank's part in its place; inputs and
      targets are then [batch, sequence, ...].
    - ``recompute_parts``: recompute module (of ``autopar.graph.RECOMPUTE_MODULES``) to patterns of the submodules that
      it consists of, see ``autopar.runtime.parallel.recompute``. For selective recomputation.

    Args:
        module: the whole model, equal on all ranks, taking one tensor whose first dimension is the batch.
        plan: for as many ranks as there are.
        loss_fn: from the module's output and the targets of a microbatch to its mean loss.
        num_microbatches: forward passes per step of each data parallel rank.
        device: where to compute; by default this rank's CUDA device, or the CPU where there is none.
        tensor_parallel_plan: instead of the module's own.
        mesh: of this layout, to use process groups again; made if None.
        compute_dtype: of forward, backward and what they send, such as ``torch.bfloat16``. Parameters, the sums of
            their gradients and the loss keep the module's own type, fp32. None computes in that as well.
        compiled: compile each block by ``torch.compile``; for data parallelism and pipelines.

    Raises:
        PlanError: the plan does not fit the ranks, the module or this executor; the message says what to use.
    """
    spec = getattr(module, "spec", None)
    check_supported(
        plan, spec if isinstance(spec, ModelSpec) else None, num_microbatches, getattr(module, "source", "")
    )
    if compiled and (reasons := unsupported_compiled(plan)):
        raise PlanError(f"plan {plan.slug} cannot be compiled: " + "; ".join(reason.detail for reason in reasons))
    device = torch.device(device) if device is not None else default_device()
    if mesh is None:
        mesh = build_mesh(plan.layout, device.type)
    parts, whole = find_parts(module), whole_model(module)
    tp_mesh = submesh(mesh, "tp")
    products = resolve_plan(module, tensor_parallel_plan, plan.layout.tp) if tp_mesh is not None else {}
    experts = find_experts(module, plan, mesh)
    chains, bare_chains, ties = _cut(module, parts, plan, mesh)
    cp_mesh = submesh(mesh, "cp")
    if cp_mesh is not None:
        check_parts_known(module, plan.layout.cp)
    context = ContextPart(cp_mesh) if cp_mesh is not None else None
    partial_names: tuple[str, ...] = ()
    rows: dict[str, Runs] = {}
    divided: dict[str, tuple[Cut, ...]] = {}
    wrapped = []
    for chain in chains:
        chain.to(device)
        if context is not None:
            set_part(chain, context)
        if tp_mesh is not None:
            changed = divide(chain, tp_mesh, products, parts, sequence_parallel=plan.sequence_parallel)
            partial_names, rows = partial_names + changed.partial, rows | changed.rows
        order_tokens(chain, context, tp_mesh)
        if experts is not None:
            divide_experts(chain, experts, plan.layout)
        for recomputed in recompute(chain, module, parts, plan):
            _gather_in_recomputation(recomputed, cp_mesh)
        divided |= cuts_by_name(chain)
        if compiled:
            compile_blocks(chain, parts.blocks)
        wrapped.append(replicate_or_shard(chain, mesh, plan, parts.blocks, experts, compute_dtype))
    if compute_dtype is not None:
        loss_fn, bare_chains = in_fp32(loss_fn), tuple(chain.to(compute_dtype) for chain in bare_chains)
    owned = named_parameters(wrapped)
    return ParallelModel(
        name=spec.name if isinstance(spec, ModelSpec) else type(module).__name__,
        plan=plan,
        mesh=mesh,
        device=device,
        num_microbatches=num_microbatches,
        modules=tuple(wrapped),
        loss_fn=loss_fn,
        compute_dtype=compute_dtype,
        compiled=compiled,
        owned=owned,
        holdings=find_holdings(whole, owned, divided, rows=rows),
        divided_vocabulary=VOCAB in products.values(),
        tied=join_ties(ties, owned, mesh),
        context=context,
        partial_names=frozenset(partial_names) - (experts.names if experts is not None else frozenset()),
        experts=experts,
        bare_chains=bare_chains,
    )


def _gather_in_recomputation(module: nn.Module, ranks: DeviceMesh | None) -> None:
    """Attention that runs again gathers its keys and values then, and need not do it once more."""
    if ranks is not None:
        set_part(module, ContextPart(ranks, gathers_again=False))


def default_device() -> torch.device:
    """This rank's CUDA device if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _cut(
    module: nn.Module, parts: Parts, plan: Plan, mesh: DeviceMesh | None
) -> tuple[list[nn.Module], tuple[nn.Module, ...], tuple[Tie, ...]]:
    """This rank's chains, all stages without values (for the shapes between them), and what stages share.

    Without a pipeline it is the module alone.
    """
    if plan.layout.pp == 1:
        return [module], (), ()
    if not parts.chained:
        raise PlanError(
            f"pp={plan.layout.pp} needs a model that can be cut: declare pipeline_parts() on it, which returns the "
            "names of the modules before the blocks, of the blocks and after them, in order of call; or use pp=1"
        )
    assert mesh is not None
    stages, bare = parts.stages(plan), skeleton(module)
    names = [name for stage in stages for name in stage]
    covered = {id(p) for name in names for p in module.get_submodule(name).parameters()}
    if any(id(parameter) not in covered for parameter in module.parameters()):
        missing = [name for name, parameter in module.named_parameters() if id(parameter) not in covered]
        raise PlanError(f"pipeline_parts() leaves out the parameters {', '.join(missing[:3])}")
    ties = find_ties(module, stages, plan)
    chains: list[nn.Module] = [Chain(module, stages[i]) for i in stages_of_rank(plan, mesh.get_local_rank("pp"))]
    separate_copies(chains)
    return chains, tuple(Chain(bare, stage) for stage in stages), ties

"""Expert parallelism: ranks hold different experts, and tokens travel to them and back.

The ranks of a pipeline stage are divided anew (see ``autopar.layout``): ep ranks hold num_experts / ep experts each,
etp ranks divide the inner width of an expert, and edp ranks hold equal parts. Rows go to the ranks of their experts by
an all-to-all with as many rows for each as the router sends there, told by an all-to-all of the counts before, and
come back the same way (GShard, Lepikhin et al. 2020). The etp ranks that divide an expert give each other all rows that
they received and add up their results for each, again by all-to-all, since their numbers of rows differ.

A collective's payload are the rows that a rank hands over, those that it keeps included: forward, the k rows of each
of its tokens on the way there, those it received on the way back; backward the other way round. A rank's own payload
depends on the router, the sum over the ranks of a group does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from autopar.errors import PlanError
from autopar.layout import Layout
from autopar.model.experts import ExpertProduct, Experts, MixtureOfExperts
from autopar.plan import Plan
from autopar.runtime.parallel.context_parallel import ContextPart
from autopar.runtime.parallel.mesh import expert_mesh, submesh
from autopar.runtime.parallel.tensor_parallel import local_tensor

EXPERTS_DIM = 0
EQUAL_AXES = ("edp_replicate", "edp")


@dataclass(frozen=True, slots=True)
class TokenExchange:
    """Rows to the ranks of their experts and back; a ``MixtureOfExperts`` calls it.

    Attributes:
        ep: ranks with different experts; None for one.
        etp: ranks that divide the same experts; None for one.
    """

    ep: dist.ProcessGroup | None
    etp: dist.ProcessGroup | None

    def __call__(self, experts: Experts, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows [R, h] in the order of experts, counts [E] of them, to results [R, h]."""
        sent = counts.view(_size(self.ep), -1)
        arriving = sent if self.ep is None else functional.all_to_all_single(sent, None, None, self.ep)
        arriving = arriving.unsqueeze(0)
        if self.etp is not None:
            arriving = functional.all_gather_tensor(arriving.contiguous(), 0, self.etp)
        # The only time that the host waits for the router. Tensors are [etp, ep, experts of this rank].
        own, *shares = torch.cat((sent.unsqueeze(0), arriving)).tolist()
        there, here = _totals(own), _totals(shares[0 if self.etp is None else dist.get_rank(self.etp)])
        per_share = [sum(_totals(share)) for share in shares]
        per_expert = [sum(column) for column in zip(*(row for share in shares for row in share), strict=True)]
        evenly = [sum(here)] * len(shares)

        if self.ep is not None:
            rows = _all_to_all(rows, here, there, self.ep)
        if self.etp is not None:
            rows = _all_to_all(rows.repeat(len(shares), 1), per_share, evenly, self.etp)
        kinds = torch.arange(sent.shape[1], device=rows.device).repeat(arriving.numel() // sent.shape[1])
        order = kinds.repeat_interleave(arriving.flatten(), output_size=sum(per_share)).argsort(stable=True)
        results = experts(rows.index_select(0, order), per_expert).index_select(0, order.argsort())
        if self.etp is not None:
            results = _all_to_all(results, evenly, per_share, self.etp).view(len(shares), sum(here), -1).sum(0)
        return results if self.ep is None else _all_to_all(results, there, here, self.ep)


def _totals(counts: Sequence[Sequence[int]]) -> list[int]:
    return [sum(row) for row in counts]


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def _all_to_all(rows: Tensor, received: Sequence[int], sent: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    return functional.all_to_all_single_autograd(rows.contiguous(), list(received), list(sent), group)


@dataclass(frozen=True, kw_only=True, slots=True)
class DividedSequence:
    """Tokens of sequences that ranks divide, see ``autopar.model.experts.TokenOrder``.

    Context parallel ranks have two chunks of a sequence each (``ContextPart``); tensor parallel ranks divide, one after
    another, what such a rank has.

    Attributes:
        context: None if no context parallel ranks divide it.
        tensor: None if no tensor parallel ranks divide it.
    """

    context: ContextPart | None
    tensor: DeviceMesh | None

    @property
    def num_ranks(self) -> int:
        """Ranks that divide a sequence."""
        return self._degrees[0] * self._degrees[1]

    @property
    def runs(self) -> int:
        """Contiguous parts of a rank's tokens."""
        return 1 if self.context is None else 2

    @property
    def _degrees(self) -> tuple[int, int]:
        return (
            1 if self.context is None else self.context.num_ranks,
            1 if self.tensor is None else self.tensor.size(),
        )

    def counted_before(self, counts: Tensor) -> Tensor:
        """Rows of all tokens before each run, of [B, runs, E]."""
        everyone = counts.unsqueeze(0)
        tensor_group = None if self.tensor is None else self.tensor.get_group()
        context_group = None if self.context is None else self.context.group
        for group in (tensor_group, context_group):
            if group is not None:
                everyone = functional.all_gather_tensor(everyone.contiguous(), 0, group)
        parts = everyone.movedim(2, 1).flatten(0, 1)
        places = [
            place for c in range(self._degrees[0]) for t in range(self._degrees[1]) for place in self._places(c, t)
        ]
        rank = 0 if self.context is None else self.context.rank
        mine = self._places(rank, 0 if self.tensor is None else self.tensor.get_local_rank())
        before = [[index for index, place in enumerate(places) if place < own] for own in mine]
        return torch.stack([parts[indices].sum(0) for indices in before], dim=1)

    def _places(self, context_rank: int, tensor_rank: int) -> list[int]:
        """Places in the sequence of the runs of a rank."""
        contexts, tensors = self._degrees
        if contexts == 1:
            return [tensor_rank]
        chunks = context_rank, 2 * contexts - 1 - context_rank
        held = [chunk * tensors + part for chunk in chunks for part in range(tensors)]
        return held[2 * tensor_rank : 2 * tensor_rank + 2]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertRanks:
    """How the experts of a layout are divided, where that is not how dense weights are.

    Attributes:
        mesh: axes ``edp_replicate``, ``edp``, ``ep`` and ``etp`` with more than one rank, behind ``pp``.
        names: of the parameters of experts, in the whole model.
        divisor: the sum of their gradients over the edp ranks is divided by that: dp * cp.
        sharded: ``fully_shard`` divides them over the edp ranks and reduces their gradients.
    """

    mesh: DeviceMesh
    names: frozenset[str]
    divisor: int
    sharded: bool


def find_experts(module: nn.Module, plan: Plan, mesh: DeviceMesh | None) -> ExpertRanks | None:
    """Plan the experts of a whole model; None if it has none or all ranks hold them as they hold dense weights.

    Collective for the first plan of a mesh and of these degrees.

    Raises:
        PlanError: the plan divides experts, and the model has none.
    """
    layout, mixtures = plan.layout, _mixtures(module)
    if layout.ep * layout.etp > 1 and not mixtures:
        raise PlanError(
            f"ep={layout.ep} and etp={layout.etp} divide experts, but the model has no MixtureOfExperts: use 1 for both"
        )
    if mesh is None or layout.ep * layout.etp * layout.tp == 1 or not mixtures:
        return None
    ranks = expert_mesh(mesh, layout)
    names = {f"{path}.{name}" for path, mixture in mixtures for name, _ in expert_parameters(mixture)}
    return ExpertRanks(
        mesh=ranks,
        names=frozenset(names),
        divisor=layout.dp * layout.cp,
        sharded=plan.zero_stage > 0 and layout.dp_shard * layout.cp > 1 and submesh(ranks, "edp") is not None,
    )


def _mixtures(module: nn.Module) -> list[tuple[str, MixtureOfExperts]]:
    return [(name, child) for name, child in module.named_modules() if isinstance(child, MixtureOfExperts)]


def expert_parameters(mixture: MixtureOfExperts) -> list[tuple[str, nn.Parameter]]:
    """Weights and biases of the routed experts."""
    return [(f"{name}.{kind}", p) for name in ("up", "down") for kind, p in getattr(mixture, name).named_parameters()]


def order_tokens(chain: nn.Module, context: ContextPart | None, tensor_ranks: DeviceMesh | None) -> None:
    """Tell the mixtures of a module which ranks divide its sequences, so that a capacity counts in their order."""
    for _, mixture in _mixtures(chain):
        if context is not None or tensor_ranks is not None:
            mixture.order = DividedSequence(context=context, tensor=tensor_ranks)


def divide_experts(chain: nn.Module, ranks: ExpertRanks, layout: Layout) -> None:
    """Leave this rank's part of the experts of a module (the whole model or a stage), and let it exchange tokens.

    The parts are DTensors over the axes ep and etp.
    """
    holders = submesh(ranks.mesh, "ep", "etp")
    groups = {axis: part.get_group() for axis in ("ep", "etp") if (part := submesh(ranks.mesh, axis)) is not None}
    for _, mixture in _mixtures(chain):
        if holders is not None:
            for product, width_dim in ((mixture.up, -2), (mixture.down, -1)):
                _divide_product(product, holders, width_dim)
            mixture.exchange = TokenExchange(groups.get("ep"), groups.get("etp"))
            mixture.down.shares = layout.etp


def _divide_product(product: ExpertProduct, holders: DeviceMesh, width_dim: int) -> None:
    """Divide the weights' experts and their dimension ``width_dim``, which a bias has if it is one of the features."""
    for name, parameter in list(product.named_parameters()):
        dim = product.weight.ndim + width_dim
        local = parameter.data
        placements: list[Placement] = []
        for axis in holders.mesh_dim_names or ():
            cut = EXPERTS_DIM if axis == "ep" else dim
            divides = cut < parameter.ndim
            placements.append(Shard(cut) if divides else Replicate())
            if divides:
                local = local.chunk(holders[axis].size(), cut)[holders.get_local_rank(axis)]
        divided = DTensor.from_local(local.contiguous().clone(), holders, placements, run_check=False)
        product.register_parameter(name, nn.Parameter(divided))


def shard_experts(chain: nn.Module, ranks: ExpertRanks, *, reshard: bool, policy: MixedPrecisionPolicy) -> None:
    """Divide experts over the ranks that hold equal ones, as ``fully_shard`` does, each mixture by itself.

    Its division of the gradient would be by its own ranks, not by those of the loss.
    """
    mesh = submesh(ranks.mesh, *EQUAL_AXES)
    assert mesh is not None
    size = mesh.size(mesh.ndim - 1)
    for _, mixture in _mixtures(chain):
        sharded = fully_shard(
            [mixture.up, mixture.down],
            mesh=mesh,
            reshard_after_forward=reshard,
            mp_policy=policy,
            shard_placement_fn=lambda parameter: _shard_dim(parameter, size),
        )
        for module in sharded:
            module.set_gradient_divide_factor(ranks.divisor)
            # Otherwise the division is part of the reduction, which gloo cannot do.
            module.set_force_sum_reduction_for_comms(True)


def _shard_dim(parameter: nn.Parameter, size: int) -> Shard:
    """The first dimension of a rank's part that divides evenly; where none does, experts are divided unevenly."""
    shape = local_tensor(parameter).shape
    return Shard(next((dim for dim in range(len(shape)) if shape[dim] % size == 0), EXPERTS_DIM))


def reduce_experts(parameters: Iterable[nn.Parameter], ranks: ExpertRanks) -> None:
    """Sum the gradients of experts that are not sharded over the ranks that hold equal ones, and scale them."""
    groups = [axis.get_group() for name in EQUAL_AXES if (axis := submesh(ranks.mesh, name)) is not None]
    for parameter in parameters:
        if parameter.grad is None:
            continue
        gradient = local_tensor(parameter.grad)
        for group in groups:
            dist.all_reduce(gradient, group=group)
        gradient.div_(ranks.divisor)

"""This rank's part of a model under a plan: its parameters, and one training step of its share of the batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from autopar.errors import InputError
from autopar.plan import Plan
from autopar.runtime.parallel.clipping import clip_grad_norm_
from autopar.runtime.parallel.context_parallel import SEQUENCE_DIM, ContextPart
from autopar.runtime.parallel.data_parallel import accumulating
from autopar.runtime.parallel.expert_parallel import ExpertRanks, reduce_experts
from autopar.runtime.parallel.holdings import Holding
from autopar.runtime.parallel.mesh import submesh
from autopar.runtime.parallel.parts import boundaries
from autopar.runtime.parallel.pipeline import LossFn, Observer, Unobserved, build_schedule, observed, rank_of
from autopar.runtime.parallel.precision import casting_once, narrowed, plain_name
from autopar.runtime.parallel.tensor_parallel import local_tensor, place_gradients, reduce_partial, set_aside
from autopar.runtime.parallel.tied import Tied, sum_tied
from autopar.runtime.parallel.vocabulary import loss_context
from autopar.runtime.support import sequence_divisor


@dataclass(kw_only=True, slots=True)
class ParallelModel:
    """What ``parallelize`` returns.

    Attributes:
        name: of the model, empty if it has none.
        plan: the plan.
        mesh: DeviceMesh of the axes with more than one rank; None for a single rank.
        device: where it computes.
        num_microbatches: forward passes per step.
        modules: one per virtual stage of this rank, wrapped; without a pipeline just the model.
        loss_fn: of one microbatch.
        compute_dtype: of forward and backward, if it is not that of the parameters.
        compiled: whether blocks are, which then cast their weights anew for every microbatch.
        owned: this rank's parameters by name. Kept, since DDP over tensor parallel modules hides theirs.
        holdings: what of the whole model each of ``owned`` is, in the same order.
        partial_names: parameters whose gradients are summed over the tensor parallel ranks at the end of a step.
        divided_vocabulary: logits are divided over the tensor parallel ranks.
        tied: this rank's copies of parameters that pipeline stages share; their gradients are summed then, too.
        context: this rank's part of every sequence; None if it has them whole.
        experts: how experts are divided, if otherwise than dense weights.
        bare_chains: all stages of the model without values, to learn the shapes between them.
        observer: told of every forward and backward (``2F0``: stage 2, forward, microbatch 0).
    """

    name: str
    plan: Plan
    mesh: DeviceMesh | None
    device: torch.device
    num_microbatches: int
    modules: tuple[nn.Module, ...]
    loss_fn: LossFn
    compute_dtype: torch.dtype | None
    compiled: bool
    owned: tuple[tuple[str, nn.Parameter], ...]
    holdings: tuple[Holding, ...]
    partial_names: frozenset[str]
    divided_vocabulary: bool
    tied: tuple[Tied, ...]
    context: ContextPart | None
    experts: ExpertRanks | None
    bare_chains: tuple[nn.Module, ...]
    observer: Observer = field(default_factory=Unobserved)
    _schedules: dict[tuple[torch.Size, torch.dtype], Any] = field(default_factory=dict)

    @property
    def module(self) -> nn.Module:
        """The only module of this rank, or a list of its virtual stages."""
        return self.modules[0] if len(self.modules) == 1 else nn.ModuleList(self.modules)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters under their names in the whole model; divided ones are DTensors (not under DDP)."""
        yield from self.owned

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's parameters, for an optimizer."""
        return (parameter for _, parameter in self.named_parameters())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The same in groups of one kind (plain tensors; DTensors of one mesh), as fused optimizers need them."""
        groups: dict[Any, list[nn.Parameter]] = {}
        for parameter in self.parameters():
            key = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault(key, []).append(parameter)
        return [{"params": parameters} for parameters in groups.values()]

    @property
    def cast_dtype(self) -> torch.dtype | None:
        """What weights are cast to once for a whole step; None where nothing is kept beyond a microbatch.

        A copy that a compiled block makes belongs to its own graph, which backward frees.
        """
        return None if self.compiled else self.compute_dtype

    def train_step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward of this data parallel rank's share of the batch; gradients are then ready.

        Gradients are those of the mean loss of the global batch (each data parallel rank takes an equal share), added
        to what ``.grad`` holds. Every rank of a pipeline, of a tensor parallel and of a context parallel group
        passes the same share, of whole sequences.

        Args:
            inputs: [local batch, ...], on this rank's device; [local batch, sequence, ...] where sequences are divided.
            targets: the same.

        Returns:
            Mean loss of the local batch, a scalar without gradient, on every rank.

        Raises:
            InputError: the share does not divide into the microbatches, or its sequences into the ranks that divide
                them.
        """
        self._check_batch(inputs, targets)
        inputs = self.local_tokens(narrowed(inputs, self.compute_dtype))
        targets = self.local_tokens(targets)
        step = self._pipeline_step if self.plan.layout.pp > 1 else self._plain_step
        partial = [p for name, p in self.owned if name in self.partial_names]
        ranks = self.experts if self.experts is not None and not self.experts.sharded else None
        experts = [p for name, p in self.owned if ranks is not None and name in ranks.names]
        tied = [p for shared in self.tied for p in shared.parameters]
        with set_aside(list(dict.fromkeys([*partial, *experts, *tied]))):
            with casting_once(self.cast_dtype), self.loss_context():
                loss = step(inputs, targets)
            place_gradients(self.parameters())
            if partial:
                mesh = submesh(self.mesh, "tp")
                assert mesh is not None
                reduce_partial(partial, mesh)
            if ranks is not None:
                reduce_experts(experts, ranks)
            sum_tied(self.tied)
        if self.context is not None:
            loss = loss.to(torch.float32)
            dist.all_reduce(loss, dist.ReduceOp.AVG, group=self.context.group)
        return loss

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Shorten the gradient of the whole model to ``max_norm`` if it is longer; every rank calls it.

        Returns:
            Its norm before, a scalar in fp32, the same on every rank: that of all parameters of the whole model, each
            counted once. inf for ``max_norm`` only measures it.
        """
        held = ((parameter, holding) for (_, parameter), holding in zip(self.owned, self.holdings, strict=True))
        return clip_grad_norm_(held, max_norm, self.device)

    def _check_batch(self, inputs: Tensor, targets: Tensor) -> None:
        if inputs.shape[0] % self.num_microbatches:
            raise InputError(
                f"a local batch of {inputs.shape[0]} does not divide into {self.num_microbatches} microbatches"
            )
        layout = self.plan.layout
        parts = sequence_divisor(self.plan)
        if parts == 1:
            return
        for name, tensor in (("inputs", inputs), ("targets", targets)):
            length = tensor.shape[SEQUENCE_DIM] if tensor.dim() > SEQUENCE_DIM else 1
            if (layout.cp > 1 or name == "inputs") and length % parts:
                raise InputError(
                    f"{name} have sequences of {length} tokens, which cp={layout.cp}, tp={layout.tp} divide into "
                    f"{parts} equal parts: use a multiple of {parts}"
                )

    def local_tokens(self, whole: Tensor) -> Tensor:
        """This rank's part of the tokens of [batch, sequence, ...]: all, but under context parallelism."""
        return whole if self.context is None else self.context.local(whole)

    def loss_context(self) -> AbstractContextManager[Any]:
        """Where ``loss_of`` and its backward have to run."""
        return loss_context(self.divided_vocabulary)

    def loss_of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of a microbatch's outputs, on this rank's tokens, the same on all its tensor parallel ranks."""
        return local_tensor(self.loss_fn(outputs, targets))

    def _scaled_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss_of(outputs, targets) / self.num_microbatches

    def _plain_step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        module, total = self.modules[0], torch.zeros((), device=self.device)
        batches = zip(inputs.chunk(self.num_microbatches), targets.chunk(self.num_microbatches), strict=True)
        for index, (batch, wanted) in enumerate(batches):
            last = index == self.num_microbatches - 1
            with accumulating(module, last=last, keep_gathered=self.plan.zero_stage < 3):
                with observed(self.observer, f"0F{index}"):
                    loss = self._scaled_loss(module(batch), wanted)
                with observed(self.observer, f"0B{index}"):
                    loss.backward()
            total += loss.detach()
        return total

    def _pipeline_step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        assert self.mesh is not None
        inputs = inputs.contiguous()
        group, pp_rank = self.mesh.get_group("pp"), self.mesh.get_local_rank("pp")
        schedule = self._schedule(inputs, group)
        losses: list[Tensor] = []
        end = rank_of(self.plan, self.plan.num_stages - 1)
        last = pp_rank == end
        schedule.step(
            *((inputs,) if pp_rank == 0 else ()),
            target=targets if last else None,
            losses=losses if last else None,
            return_outputs=False,
        )
        total = torch.stack([loss.detach() for loss in losses]).sum() if last else torch.zeros((), device=self.device)
        total = total.to(torch.float32)
        dist.broadcast(total, group=group, group_src=end)
        return total

    def _schedule(self, inputs: Tensor, group: dist.ProcessGroup) -> Any:
        microbatch = inputs[: inputs.shape[0] // self.num_microbatches]
        key = (microbatch.shape, microbatch.dtype)
        if key not in self._schedules:
            self._schedules.clear()
            self._schedules[key] = build_schedule(
                self.plan,
                self.modules,
                self.boundaries(microbatch),
                num_microbatches=self.num_microbatches,
                loss_fn=self._scaled_loss,
                device=self.device,
                group=group,
                observer=_Relay(self),
            )
        return self._schedules[key]

    def boundaries(self, microbatch: Tensor) -> tuple[Tensor, ...]:
        """Meta tensors: the input of every virtual stage of the model and the output of the last, on this rank."""
        first, *inner, last = boundaries(self.bare_chains, microbatch)
        if self.plan.sequence_parallel:
            inner = [x.chunk(self.plan.layout.tp, SEQUENCE_DIM)[0] for x in inner]
        return (first, *inner, last)


@dataclass(frozen=True, slots=True)
class _Relay:
    """Passes actions to whichever observer the model has at the time."""

    model: ParallelModel

    def begin(self, action: str) -> None:
        self.model.observer.begin(action)

    def end(self, action: str) -> None:
        self.model.observer.end(action)


def named_parameters(modules: Iterable[nn.Module]) -> tuple[tuple[str, nn.Parameter], ...]:
    """Parameters of wrapped modules under their names in the whole model."""
    inner = [module.module if isinstance(module, DistributedDataParallel) else module for module in modules]
    return tuple((plain_name(name), p) for module in inner for name, p in module.named_parameters())

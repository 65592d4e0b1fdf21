"""One plan's training loop in one rank: batches, optimizer, and steps that may be watched."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from autopar.model.transformer import build, language_model_loss
from autopar.plan import Plan
from autopar.runtime.job import TrainJob
from autopar.runtime.memory import local_bytes, storages
from autopar.runtime.optimizer import build_optimizer
from autopar.runtime.parallel_model import ParallelModel
from autopar.runtime.parallelize import parallelize
from autopar.runtime.pipeline import Observer, observed
from autopar.runtime.spans import OPTIMIZER
from autopar.runtime.text import Corpus
from autopar.runtime.worker import synchronize
from autopar.workload import Precision

DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}


@dataclass(kw_only=True, slots=True)
class Trainer:
    """A model under a plan with its optimizer and data.

    Attributes:
        losses: mean loss of this data parallel rank's share, each step so far, on the device.
        next_step: index of the step to come.
        gradient_bytes: of this rank, in the last step.
        buckets: storages that DDP keeps between steps for its gradients.
    """

    job: TrainJob
    plan: Plan
    model: ParallelModel
    optimizer: torch.optim.Optimizer
    corpus: Corpus
    losses: list[Tensor] = field(default_factory=list)
    next_step: int = 0
    gradient_bytes: int = 0
    buckets: dict[int, int] = field(default_factory=dict)
    _batch: Tensor | None = None

    def prepare(self) -> None:
        """Bring the batch of the next step to the device, so that the step need not wait for it."""
        layout, coordinates = self.plan.layout, self.plan.layout.coordinates(_rank())
        share = coordinates["dp_replicate"] * layout.dp_shard + coordinates["dp_shard"]
        tokens = self.corpus.share(self.next_step, self.job.workload.global_batch, share, layout.dp)
        self._batch = tokens.to(self.model.device)

    def step(self, observer: Observer | None = None) -> None:
        """Forward, backward, optimizer and release of gradients, on the prepared batch."""
        assert self._batch is not None
        inputs, targets = self._batch[:, :-1], self._batch[:, 1:]
        if observer is not None:
            self.model.observer, usual = observer, self.model.observer
        self.losses.append(self.model.train_step(inputs, targets))
        if observer is None:
            self.optimizer.step()
        else:
            with observed(observer, OPTIMIZER):
                self.optimizer.step()
            self.model.observer = usual
        self.optimizer.zero_grad(set_to_none=True)
        self.next_step += 1

    def step_weighing_gradients(self) -> None:
        """A step in which the bytes of gradients are noted before they are released."""
        assert self._batch is not None
        self.losses.append(self.model.train_step(self._batch[:, :-1], self._batch[:, 1:]))
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        self.gradient_bytes = local_bytes(gradients)
        replicated = self.plan.zero_stage == 0 and self.plan.layout.dp > 1
        self.buckets = storages(gradients) if replicated else {}
        del gradients
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.next_step += 1

    def timed_step(self) -> float:
        """A step that all ranks begin together; its wall seconds on this rank."""
        self.prepare()
        if dist.get_world_size() > 1:
            dist.barrier()
        synchronize(self.model.device)
        start = time.perf_counter()
        self.step()
        synchronize(self.model.device)
        return time.perf_counter() - start

    def parameter_bytes(self) -> int:
        """Bytes of this rank's parameters between steps."""
        return local_bytes(self.model.parameters())

    def optimizer_bytes(self) -> int:
        """Bytes of this rank's optimizer state."""
        return local_bytes(
            value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        )


def build_trainer(
    job: TrainJob, plan: Plan, corpus: Corpus, device: torch.device, mesh: DeviceMesh | None, observer: Observer
) -> Trainer:
    """Build the model from its seed, divide it by the plan, and make its optimizer."""
    module = build(job.model, job.seed).to(DTYPES[job.workload.precision])
    model = parallelize(
        module,
        plan,
        loss_fn=language_model_loss,
        num_microbatches=plan.num_microbatches(job.workload),
        device=device,
        mesh=mesh,
    )
    model.observer = observer
    optimizer = build_optimizer(model, job.workload.optimizer, learning_rate=job.learning_rate)
    return Trainer(job=job, plan=plan, model=model, optimizer=optimizer, corpus=corpus)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0

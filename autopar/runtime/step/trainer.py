"""One plan's training step in one rank: model, optimizer, learning rate, and steps that may be watched."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from autopar.plan import Plan
from autopar.runtime.job import TrainJob
from autopar.runtime.models.module import build_module, objective_of
from autopar.runtime.models.objective import Objective
from autopar.runtime.observe.memory import local_bytes
from autopar.runtime.observe.spans import OPTIMIZER
from autopar.runtime.parallel.parallel_model import ParallelModel
from autopar.runtime.parallel.parallelize import parallelize
from autopar.runtime.parallel.pipeline import Observer, observed
from autopar.runtime.rates import rate_at
from autopar.runtime.step.bad_numbers import check_numbers
from autopar.runtime.step.optimizer import AdamWOptions, build_optimizer
from autopar.runtime.step.out_of_memory import naming_memory
from autopar.workload import Precision

COMPUTE_DTYPES = {Precision.FP32: None, Precision.BF16: torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What a step left behind, on the device: nobody has waited for it yet.

    Attributes:
        index: of the step, from 0.
        loss: mean of this data parallel rank's share, a scalar.
        grad_norm: of the whole gradient before it was clipped, a scalar; None where nobody asked.
    """

    index: int
    loss: Tensor
    grad_norm: Tensor | None


@dataclass(kw_only=True, slots=True)
class Trainer:
    """A model under a plan with its optimizer.

    Attributes:
        objective: what the model learns, which says how samples become inputs and targets.
        next_step: index of the step to come.
    """

    job: TrainJob
    plan: Plan
    model: ParallelModel
    optimizer: torch.optim.Optimizer
    objective: Objective
    next_step: int = 0

    def step(
        self, batch: Tensor, observer: Observer | None = None, on_gradients: Callable[[], None] | None = None
    ) -> Step:
        """Forward, backward, optimizer and release of gradients.

        Args:
            batch: this data parallel rank's share, [local batch, seq_len + 1], on the device.
            observer: told of this step's actions instead of the usual one.
            on_gradients: called when the gradients are there.

        Raises:
            RunError: the norm, if it is asked for, or with it the loss is not finite, and nothing was updated; or the
                memory was not enough.
        """
        predicted = self.job.predicted_memory
        with naming_memory(f"step {self.next_step}", self.held_bytes, self.model.device, predicted):
            return self._step(batch, observer, on_gradients)

    def _step(self, batch: Tensor, observer: Observer | None, on_gradients: Callable[[], None] | None) -> Step:
        if observer is not None:
            self.model.observer, usual = observer, self.model.observer
        inputs, targets = self.objective.split(batch)
        loss = self.model.train_step(inputs, targets)
        if on_gradients is not None:
            on_gradients()
        norm = self._clip()
        if norm is not None:
            check_numbers(self.model, self.next_step, loss, norm, inputs, targets)
        self._set_rate()
        if observer is None:
            self.optimizer.step()
        else:
            with observed(observer, OPTIMIZER):
                self.optimizer.step()
            self.model.observer = usual
        self.optimizer.zero_grad(set_to_none=True)
        self.next_step += 1
        return Step(index=self.next_step - 1, loss=loss, grad_norm=norm)

    def _clip(self) -> Tensor | None:
        if self.job.clip is None:
            return None
        norm: Tensor = self.model.clip_grad_norm_(self.job.clip or math.inf)
        return norm

    def _set_rate(self) -> None:
        if self.job.training is not None:
            rate = self.rate(self.next_step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        if self.job.training is None:
            return self.job.learning_rate
        return rate_at(step, peak=self.job.learning_rate, steps=self.job.steps, schedule=self.job.training.rate)

    def held_bytes(self) -> dict[str, int]:
        """Bytes of parameters, gradients and optimizer state on this rank, as they are now."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return {
            "parameters": self.parameter_bytes(), "gradients": local_bytes(gradients),
            "optimizer": self.optimizer_bytes(),
        }  # fmt: skip

    def parameter_bytes(self) -> int:
        """Bytes of this rank's parameters between steps."""
        return local_bytes(self.model.parameters())

    def optimizer_bytes(self) -> int:
        """Bytes of this rank's optimizer state."""
        return local_bytes(
            value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        )


def build_trainer(
    job: TrainJob, plan: Plan, device: torch.device, mesh: DeviceMesh | None, observer: Observer
) -> Trainer:
    """Build the model from its seed, divide it by the plan, and make its optimizer."""
    objective = objective_of(job.model, seq_len=job.workload.seq_len, seed=job.seed)
    model = parallelize(
        build_module(job.model, job.source, job.seed),
        plan,
        loss_fn=objective.loss,
        num_microbatches=plan.num_microbatches(job.workload),
        device=device,
        mesh=mesh,
        compute_dtype=COMPUTE_DTYPES[job.workload.precision],
        compiled=job.compiled,
    )
    model.observer = observer
    optimizer = build_optimizer(
        model, job.workload.optimizer, learning_rate=job.learning_rate,
        adamw=AdamWOptions(betas=job.betas, weight_decay=job.weight_decay, fused=job.fused_optimizer),
    )  # fmt: skip
    return Trainer(job=job, plan=plan, model=model, optimizer=optimizer, objective=objective)

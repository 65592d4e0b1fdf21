"""Two steps under a plan held to one process before training begins, since wrong layouts need not raise anything.

The reference is plain torch: the whole global batch, in fp32, on one rank. Where that would be too much work, a small
copy of the model is checked instead, under the same layout and schedule: as many stages, narrow, with short sequences.
Nothing of a check is left behind; whoever trains afterwards builds the model from its seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from autopar.errors import RunError
from autopar.plan import Plan
from autopar.runtime.job import TrainJob
from autopar.runtime.models.module import build_module, objective_of
from autopar.runtime.models.objective import Objective
from autopar.runtime.parallel.pipeline import Unobserved
from autopar.runtime.step.optimizer import decay_groups
from autopar.runtime.step.trainer import build_trainer
from autopar.runtime.train.miniature import miniature
from autopar.workload import Optimizer, Precision

STEPS = 2
# Differences of fp32 runs from the order of sums alone are below 1e-5; of the failures that are known, wrong placement
# of fused projections and sharded weights that were gathered too late, none was below 1e-3 in the loss or 6e-2 in the
# norm.
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-4, 1e-3
# What one process may spend on the reference. FLOP: seconds of a processor core or of a GPU. Bytes of weights,
# gradients and optimizer state.
MOST_FLOPS = {"cpu": 3e11, "cuda": 3e14}
MOST_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
BYTES_PER_PARAMETER = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfCheck:
    """A check that held.

    Attributes:
        plan: slug of the plan that was checked.
        small: what was checked in place of the model; empty if it was the model itself.
        loss_error, norm_error: greatest relative differences of a step.
    """

    plan: str
    small: str
    loss_error: float
    norm_error: float

    @property
    def sentence(self) -> str:
        """For people."""
        what = f" (on {self.small}, since one process would take too long for the whole model)" if self.small else ""
        return (
            f"self-check of {self.plan}{what}: {STEPS} steps equal those of one process to {self.loss_error:.1e} in "
            f"the loss and {self.norm_error:.1e} in the gradient norm"
        )


def self_check(
    job: TrainJob,
    plan: Plan,
    device: torch.device,
    mesh: DeviceMesh | None,
    tick: Callable[[str], None] = lambda doing: None,
) -> SelfCheck:
    """Check a plan of a job; every rank calls it. The random state is as it was before.

    Args:
        job: tells model, workload and optimizer.
        plan: of the job.
        device: of this rank.
        mesh: of the plan's layout.
        tick: told what goes on, so that a slow check is not taken for a hanging one.

    Raises:
        RunError: loss or gradient norm of a step is not that of one process; on every rank.
    """
    checked, small = _checked_job(job, plan, device)
    [plan] = checked.plans
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        tick("self-check under the plan")
        found = _under_plan(checked, plan, device, mesh)
        tick("self-check in one process")
        wanted = torch.empty_like(found)
        if _rank() == 0:
            wanted = _in_one_process(checked, device, plan.microbatch_size, tick)
    if _world_size() > 1:
        dist.broadcast(wanted, src=0)
    return _compared(plan, small, found.tolist(), wanted.tolist())


def _checked_job(job: TrainJob, plan: Plan, device: torch.device) -> tuple[TrainJob, str]:
    workload = dataclasses.replace(job.workload, precision=Precision.FP32)
    clip = job.clip if job.clip is not None else 0.0
    whole = dataclasses.replace(job, workload=workload, plans=(plan,), clip=clip, training=None)
    parameters = _num_parameters(job)
    flops = 6.0 * parameters * workload.tokens * STEPS
    if flops <= MOST_FLOPS[device.type] and parameters * BYTES_PER_PARAMETER <= MOST_BYTES[device.type]:
        return whole, ""
    # A class of a configuration cannot be made smaller: the plan is then tried on the project's own module.
    model = dataclasses.replace(job.model, qk_norm=False) if job.source else job.model
    spec, workload, small_plan = miniature(model, workload, plan)
    what = (
        f"{spec.num_layers} blocks of width {spec.hidden_size}, {workload.global_batch} sequences of "
        f"{workload.seq_len} tokens"
    )
    return dataclasses.replace(whole, model=spec, source="", workload=workload, plans=(small_plan,)), what


def _num_parameters(job: TrainJob) -> int:
    with torch.device("meta"):
        module = build_module(job.model, job.source, job.seed)
    return sum(parameter.numel() for parameter in module.parameters())


def _batch(job: TrainJob, step: int) -> Tensor:
    """Samples of tokens by chance: int64 [global batch, seq_len + 1], the same on every rank."""
    generator = torch.Generator().manual_seed(job.seed * STEPS + step)
    size = (job.workload.global_batch, job.workload.seq_len + 1)
    # The last token of an encoder is the mask.
    tokens = torch.randint(0, job.model.vocab_size - (not job.model.causal), size, generator=generator)
    return torch.from_numpy(_objective(job).rows(lambda start, count: tokens.numpy())(step * size[0], size[0]))


def _objective(job: TrainJob) -> Objective:
    return objective_of(job.model, seq_len=job.workload.seq_len, seed=job.seed)


def _under_plan(job: TrainJob, plan: Plan, device: torch.device, mesh: DeviceMesh | None) -> Tensor:
    """Loss of the global batch and gradient norm of every step, [steps, 2]."""
    trainer = build_trainer(job, plan, device, mesh, Unobserved())
    for module in trainer.model.modules:
        module.eval()  # without dropout
    size = job.workload.global_batch // plan.layout.dp
    first, found = plan.layout.data_share(_rank()) * size, []
    for step in range(STEPS):
        done = trainer.step(_batch(job, step)[first : first + size].to(device))
        assert done.grad_norm is not None
        loss = done.loss.detach().to(torch.float64)
        if _world_size() > 1:
            dist.all_reduce(loss)
        found.append(torch.stack((loss / _world_size(), done.grad_norm.to(torch.float64))))
    return torch.stack(found)


def _in_one_process(job: TrainJob, device: torch.device, chunk: int, tick: Callable[[str], None]) -> Tensor:
    """The same by plain torch, ``chunk`` sequences at a time."""
    module, objective = build_module(job.model, job.source, job.seed).to(device).eval(), _objective(job)
    update = _plain_optimizer(job, module)
    found = []
    for step in range(STEPS):
        tokens = _batch(job, step).to(device)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for part in tokens.split(chunk):
            inputs, targets = objective.split(part)
            loss = objective.loss(module(inputs), targets) * (len(part) / len(tokens))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            tick("self-check in one process")
        norm = nn.utils.clip_grad_norm_(module.parameters(), job.clip or torch.inf)
        update.step()
        update.zero_grad(set_to_none=True)
        found.append(torch.stack((total, norm.to(torch.float64))))
    return torch.stack(found)


def _plain_optimizer(job: TrainJob, module: nn.Module) -> torch.optim.Optimizer:
    if job.workload.optimizer is Optimizer.SGD:
        return torch.optim.SGD(module.parameters(), lr=job.learning_rate)
    groups = decay_groups(module.named_parameters(), job.weight_decay)
    return torch.optim.AdamW(groups, lr=job.learning_rate, betas=job.betas)


def _compared(plan: Plan, small: str, found: list[list[float]], wanted: list[list[float]]) -> SelfCheck:
    errors: list[list[float]] = [[], []]
    for step, (here, there) in enumerate(zip(found, wanted, strict=True)):
        for which, (name, limit) in enumerate((("loss", LOSS_TOLERANCE), ("gradient norm", NORM_TOLERANCE))):
            error = abs(here[which] - there[which]) / max(abs(there[which]), 1e-12)
            # Also where the difference is no number.
            if not error <= limit:
                raise RunError(
                    f"self-check of plan {plan.slug} failed{f' on {small}' if small else ''}: at step {step} the "
                    f"{name} is {here[which]:.8g} under the plan and {there[which]:.8g} in one process, which differ "
                    f"by {error:.1e} where {limit:.0e} is allowed. The plan computes something else than the model: "
                    "use another one (dp alone, or without the axis that you suspect), or run without self-check if "
                    "you know better"
                )
            errors[which].append(error)
    return SelfCheck(plan=plan.slug, small=small, loss_error=max(errors[0]), norm_error=max(errors[1]))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1

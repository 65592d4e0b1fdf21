"""Started by tests through ``compare_layouts``: gradient descent under each plan, next to one process."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import autopar
from autopar.model.sequence import SequencePart
from autopar.model.spec import ModelSpec
from autopar.model.transformer import build, language_model_loss
from autopar.plan import Plan, parse_slug
from autopar.runtime.launch.progress import report_progress, send_message
from autopar.runtime.launch.worker import joined
from autopar.runtime.observe.counting import count_collectives, summed
from autopar.runtime.observe.memory import measure_peak
from autopar.runtime.parallel import context_parallel, tensor_parallel, vocabulary
from autopar.runtime.parallel.parallel_model import ParallelModel
from autopar.runtime.parallel.tensor_parallel import local_tensor
from autopar.runtime.step.evaluate import evaluate
from costmodels.records import from_plain

STEPS, RATE = 4, 0.1
# Step whose batch is evaluated before it is trained on.
EVALUATED = 2
# Weights as large as those of a trained model: with the usual ones attention hardly matters.
SCALE = 8.0


def strong(spec: ModelSpec) -> nn.Module:
    """The model with larger weights."""
    module = build(spec)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(SCALE)
    return module


def batches(spec: ModelSpec, batch: int, seq: int) -> list[Tensor]:
    """The same tokens [batch, seq + 1] for everyone, new ones each step."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, spec.vocab_size // 2, (batch, seq + 1), generator=generator) for _ in range(STEPS)]


def one_process(spec: ModelSpec, tokens: list[Tensor]) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final weights of an ordinary loop."""
    module, losses = strong(spec), []
    update = torch.optim.SGD(module.parameters(), lr=RATE)
    for step in tokens:
        loss = language_model_loss(module(step[:, :-1]), step[:, 1:])
        loss.backward()
        update.step()
        update.zero_grad()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in module.named_parameters()}


def share(plan: Plan, tokens: Tensor) -> Tensor:
    """This data parallel rank's part of a batch."""
    at = plan.layout.coordinates(dist.get_rank())
    size = len(tokens) // plan.layout.dp
    index = at["dp_replicate"] * plan.layout.dp_shard + at["dp_shard"]
    return tokens[index * size : (index + 1) * size]


def trained(spec: ModelSpec, plan: Plan, tokens: list[Tensor]) -> tuple[ParallelModel, list[Tensor], float, Any, int]:
    """A model trained under a plan: losses, an evaluation, collectives of the last step and the second one's peak."""
    microbatches = len(share(plan, tokens[0])) // plan.microbatch_size
    model = autopar.parallelize(
        strong(spec), plan, loss_fn=language_model_loss, num_microbatches=microbatches, device="cpu"
    )
    update = torch.optim.SGD(model.parameter_groups(), lr=RATE)
    losses: list[Tensor] = []
    calls: Any = ()
    peak, evaluated = 0, math.nan
    for index, step in enumerate(tokens):
        local = share(plan, step)

        def train(_: object = None, *, local: Tensor = local) -> None:
            losses.append(model.train_step(local[:, :-1], local[:, 1:]).float())

        if index == EVALUATED:
            evaluated = evaluate(model, [(local[:, :-1], local[:, 1:])])
        if index == 1:
            weighed = measure_peak(train, torch.device("cpu"), {})
            peak = weighed.highest - weighed.held
        elif index == STEPS - 1:
            calls = count_collectives(train, model.mesh)
        else:
            train()
        update.step()
        update.zero_grad()
    return model, losses, evaluated, calls, peak


def weight_error(model: ParallelModel, weights: Mapping[str, Tensor]) -> float:
    """Largest difference of this rank's pieces from the same pieces of one process."""
    worst = 0.0
    for (_, parameter), holding in zip(model.owned, model.holdings, strict=True):
        local, whole = local_tensor(parameter.detach()), weights[holding.name]
        assert sum(torch.Size(piece.shape).numel() for piece in holding.pieces) == local.numel(), holding.name
        for piece in holding.pieces:
            here, there = (
                tuple(slice(at, at + size) for at, size in zip(start, piece.shape, strict=True))
                for start in (piece.local, piece.offset)
            )
            worst = max(worst, (local[here] - whole[there]).abs().max().item())
    return worst


@contextmanager
def replaced(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    """Something of autopar done wrongly for a while."""
    usual = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, usual)


WRONG: dict[str, Callable[[], Any]] = {
    "": lambda: replaced(nn.Module, "__doc__", nn.Module.__doc__),  # type: ignore[arg-type]
    # A chunk attends to the first tokens of the sequence, whichever its place.
    "mask": lambda: replaced(
        context_parallel.ContextPart,
        "_mask",
        lambda part, query, end: torch.full((query.shape[2], end), -torch.inf).triu(1),
    ),
    "rows": lambda: replaced(tensor_parallel, "put_rows", lambda product, order: None),
    "scattered": lambda: replaced(
        vocabulary.ScatteredPart, "positions", lambda part, n, device: torch.arange(n // part._ranks, device=device)
    ),
    "positions": lambda: replaced(context_parallel.ContextPart, "positions", SequencePart.positions),
    "gather": lambda: replaced(context_parallel.ContextPart, "attend", SequencePart.attend),
}


def compare(case: dict[str, Any], reference: tuple[list[float], dict[str, Tensor]], tokens: list[Tensor]) -> None:
    """Train under the plan of a case and tell the test how far it is from one process."""
    plan = parse_slug(case["slug"])
    losses, weights = reference
    with WRONG[case["wrong"]]():
        model, found, evaluated, calls, peak = trained(from_plain(ModelSpec, case["spec"], "case"), plan, tokens)
    mean = torch.stack(found)
    dist.all_reduce(mean, dist.ReduceOp.AVG)
    loss_error = max((mean - torch.tensor(losses)).abs().max().item(), abs(evaluated - losses[EVALUATED]))
    errors = torch.tensor([loss_error, weight_error(model, weights)])
    dist.all_reduce(errors, dist.ReduceOp.MAX)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, ([dataclasses.asdict(entry) for entry in summed(calls)], peak))
    if dist.get_rank() == 0:
        collectives, peaks = zip(*everyone, strict=True)
        send_message(
            {"slug": case["slug"], "wrong": case["wrong"], "loss_error": errors[0].item(),
             "weight_error": errors[1].item(), "collectives": collectives, "peaks": peaks}
        )  # fmt: skip


def main(path: str) -> None:
    """Every case of the job, those of one model against one run of it."""
    job = json.loads(Path(path).read_text())
    with report_progress() as progress, joined("cpu"):
        references: dict[str, Any] = {}
        for case in job["cases"]:
            progress.update(plan=" ".join((case["spec"]["name"], case["slug"], case["wrong"])))
            key = json.dumps(case["spec"])
            if key not in references:
                spec = from_plain(ModelSpec, case["spec"], "case")
                tokens = batches(spec, job["batch"], job["seq"])
                references[key] = (one_process(spec, tokens), tokens)
            compare(case, *references[key])


if __name__ == "__main__":
    main(sys.argv[1])

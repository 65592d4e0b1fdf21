"""Started by test_gradients: norms, clipping and mixed precision of layouts against one process with plain torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from test_gradients import BATCH, DENSE, MAX_NORM, MODELS, RATE, STEPS, Reference, batch, one_process, parallel
from torch import Tensor, nn

from autopar.model.spec import ModelSpec
from autopar.plan import Plan, parse_slug
from autopar.runtime.launch.progress import report_progress, send_message
from autopar.runtime.launch.worker import joined
from autopar.runtime.observe.counting import count_collectives, summed
from autopar.runtime.parallel.parallel_model import ParallelModel
from autopar.runtime.parallel.tensor_parallel import local_tensor
from autopar.runtime.step.optimizer import build_optimizer
from autopar.workload import Optimizer


def share_of(plan: Plan, tokens: Tensor) -> Tensor:
    """This rank's share of a batch."""
    size = BATCH // plan.layout.dp
    first = plan.layout.data_share(dist.get_rank()) * size
    return tokens[first : first + size]


def furthest_gradient(model: ParallelModel, wanted: dict[str, Tensor]) -> float:
    """Greatest difference of any gradient of this rank from the piece of the whole that it is."""
    worst = 0.0
    for (_, parameter), holding in zip(model.named_parameters(), model.holdings, strict=True):
        if parameter.grad is None:
            continue
        local = local_tensor(parameter.grad)
        for piece in holding.pieces:
            here = local[tuple(slice(at, at + n) for at, n in zip(piece.local, piece.shape, strict=True))]
            there = wanted[holding.name][
                tuple(slice(at, at + n) for at, n in zip(piece.offset, piece.shape, strict=True))
            ]
            worst = max(worst, (here - there).abs().max().item())
    return worst


@contextmanager
def recorded_casts() -> Iterator[list[torch.dtype]]:
    """Types of what linear layers get while the block runs."""
    seen: list[torch.dtype] = []
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.append(args[0].dtype) if isinstance(module, nn.Linear) else None
    )
    yield seen
    handle.remove()


def try_layout(slug: str, spec: ModelSpec, dtype: torch.dtype | None, reference: Reference) -> dict[str, Any]:
    """Train a few steps under a plan; how far loss, norm and gradients are from the reference, the worst of ranks."""
    plan = parse_slug(slug)
    model = parallel(plan, spec, dtype)
    update = build_optimizer(model, Optimizer.SGD, learning_rate=RATE)
    worst: dict[str, float] = {"loss": 0.0, "norm": 0.0, "gradient": 0.0, "naive": 0.0}
    for step in range(STEPS):
        tokens = share_of(plan, batch(step))
        loss = model.train_step(tokens[:, :-1], tokens[:, 1:])
        dist.all_reduce(loss, dist.ReduceOp.AVG)
        naive = nn.utils.get_total_norm([local_tensor(p.grad) for p in model.parameters() if p.grad is not None]).item()
        norm, wanted = model.clip_grad_norm_(MAX_NORM).item(), reference.norms[step]
        errors = {
            "loss": abs(loss.item() - reference.losses[step]),
            "norm": abs(norm - wanted) / wanted,
            "gradient": furthest_gradient(model, reference.gradients[step]),
            "naive": abs(naive - wanted) / wanted,
        }
        worst = {key: max(worst[key], error) for key, error in errors.items()}
        update.step()
        update.zero_grad()
    everyone = torch.tensor(list(worst.values()))
    dist.all_reduce(everyone, dist.ReduceOp.MAX)
    return dict(zip(worst, everyone.tolist(), strict=True))


def types_and_traffic(slug: str, spec: ModelSpec, dtype: torch.dtype | None) -> dict[str, Any]:
    """Types of weights, gradients, optimizer state and products of this rank, and the collectives of a step."""
    plan = parse_slug(slug)
    model = parallel(plan, spec, dtype)
    update = build_optimizer(model, learning_rate=1e-3)
    tokens = share_of(plan, batch(0))
    with recorded_casts() as seen:
        calls = count_collectives(lambda: model.train_step(tokens[:, :-1], tokens[:, 1:]), model.mesh)  # type: ignore[arg-type]
    gradients = {str(p.grad.dtype) for p in model.parameters() if p.grad is not None}
    update.step()
    state = {str(v.dtype) for each in update.state.values() for v in each.values() if v.ndim}
    return {
        "weights": sorted({str(p.dtype) for p in model.parameters()}), "gradients": sorted(gradients),
        "state": sorted(state), "products": sorted({str(kind) for kind in seen}),
        "calls": [[c.kind, c.axis, c.count, c.num_bytes] for c in summed(calls)],
    }  # fmt: skip


def main(path: str) -> None:
    """Every case of the job, in order."""
    job = json.loads(Path(path).read_text())
    with report_progress() as progress, joined("cpu"):
        references: dict[str, Reference] = {}
        for name, slug, precision in job["cases"]:
            progress.update(plan=slug)
            if name not in references:
                references[name] = one_process(MODELS[name])
            dtype = torch.bfloat16 if precision == "bf16" else None
            found = try_layout(slug, MODELS[name], dtype, references[name])
            if dist.get_rank() == 0:
                send_message({"slug": slug, "model": name, "precision": precision, **found})
        for slug in job["types"]:
            found = types_and_traffic(slug, DENSE, torch.bfloat16)
            if dist.get_rank() == 0:
                send_message({"types of": slug, **found})


if __name__ == "__main__":
    main(sys.argv[1])

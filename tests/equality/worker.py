"""What each rank of the equality table does: train under one plan after another, compare its own weights."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import BATCH, CLIP, MODELS, MOMENTUM, RATE, STEPS
from reference import batch
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from autopar.model.transformer import build, language_model_loss
from autopar.plan import Plan, parse_slug
from autopar.runtime.launch.progress import report_progress
from autopar.runtime.launch.worker import joined
from autopar.runtime.observe.counting import CollectiveCounter, summed
from autopar.runtime.parallel.mesh import build_mesh
from autopar.runtime.parallel.parallel_model import ParallelModel
from autopar.runtime.parallel.parallelize import parallelize


def main(path: str) -> None:
    """Run the cases in the file; rank 0 writes what all ranks found beside it."""
    job, rows = json.loads(Path(path).read_text()), []
    with report_progress() as progress, joined("cpu") as device:
        torch.use_deterministic_algorithms(True, warn_only=True)
        meshes: dict[Any, Any] = {}
        for case in job["cases"]:
            progress.update(plan=case["slug"], step=0, doing="building")
            plan = parse_slug(case["slug"])
            key = plan.layout
            if key not in meshes:
                meshes[key] = build_mesh(plan.layout, device.type)
            rows.append(run(case, plan, device, meshes[key], Path(job["weights"][case["model"]]), progress))
            gc.collect()
        if dist.get_rank() == 0:
            Path(job["out"]).write_text(json.dumps(rows))


def run(case: dict[str, str], plan: Plan, device: torch.device, mesh: Any, weights: Path, progress: Any) -> Any:
    """Losses, gradient norms, differences of weights, and the collectives of the last step by rank."""
    layout, spec = plan.layout, MODELS[case["model"]]
    model = parallelize(
        build(spec), plan, loss_fn=language_model_loss, device=device, mesh=mesh,
        num_microbatches=BATCH // (layout.dp * plan.microbatch_size),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameter_groups(), lr=RATE, momentum=MOMENTUM)
    place, size = layout.coordinates(dist.get_rank()), BATCH // layout.dp
    share = place["dp_replicate"] * layout.dp_shard + place["dp_shard"]
    losses, norms, calls = [], [], []
    for step in range(STEPS):
        progress.update(step=step)
        tokens = batch(case["model"], step)[share * size : (share + 1) * size]
        counter = CollectiveCounter(mesh)
        with counter:
            loss = model.train_step(tokens[:, :-1], tokens[:, 1:]).clone()
        norms.append(float(model.clip_grad_norm_(CLIP)))
        with counter:
            optimizer.step()
        optimizer.zero_grad()
        calls = counter.calls
        dist.all_reduce(loss)
        losses.append(loss.item() / dist.get_world_size())
    found = (*compare(model, weights), norms, [vars_of(call) for call in summed(calls)])
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    differences, covered, all_norms, all_calls = zip(*everyone, strict=True)
    return {
        **case, "losses": losses, "norms": list(all_norms), "weights": max(differences), "covered": sum(covered),
        "collectives": list(all_calls),
    }  # fmt: skip


def compare(model: ParallelModel, weights: Path) -> tuple[float, int]:
    """Largest difference of this rank's weights from the reference's, and the elements that it is the first to hold."""
    worst, covered = 0.0, 0
    with safe_open(weights, framework="pt") as file:
        for (_, parameter), holding in zip(model.owned, model.holdings, strict=True):
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            whole = file.get_slice(holding.name)
            for piece in holding.pieces:
                ours = local[tuple(slice(o, o + n) for o, n in zip(piece.local, piece.shape, strict=True))]
                theirs = whole[tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))]
                if ours.numel():
                    worst = max(worst, float((ours.detach() - theirs).abs().max()))
                covered += ours.numel() * holding.first
    return worst, covered


def vars_of(call: Any) -> list[Any]:
    """A counted collective as plain data."""
    return [call.kind, call.axis, call.group_size, call.count, call.num_bytes]


if __name__ == "__main__":
    main(sys.argv[1])

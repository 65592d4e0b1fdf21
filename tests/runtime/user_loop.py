"""A training loop of a user's own: a plan, an optimizer, checkpoints. Started by test_user_loop on two ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import autopar
from autopar.plan import parse_slug
from autopar.runtime.launch.progress import report_progress, send_message

BATCH, CLIP, RATE = 8, 0.05, 0.01


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, 8, generator=generator)
    return inputs, inputs[:, :4].square()


def train(slug: str, steps: int, folder: str) -> list[float]:
    plan = parse_slug(slug)
    share, size = plan.layout.data_share(dist.get_rank()), BATCH // plan.layout.dp
    model = autopar.parallelize(
        network(), plan, loss_fn=F.mse_loss, num_microbatches=size // plan.microbatch_size, device="cpu"
    )
    optimizer = autopar.build_optimizer(model, learning_rate=RATE)
    checkpoints = autopar.Checkpoints(folder, keep=2)
    loaded, losses = checkpoints.load_latest(model, optimizer), []
    for step in range(loaded.step if loaded else 0, steps):
        inputs, targets = (tensor[share * size : (share + 1) * size] for tensor in batch_of(step))
        loss = model.train_step(inputs, targets)
        model.clip_grad_norm_(CLIP)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss, dist.ReduceOp.AVG)
        losses.append(loss.item())
    checkpoints.save(steps, model, optimizer, {})
    return losses


def plain_loop(steps: int) -> list[float]:
    module, losses = network(), []
    matrices, others = ([p for p in module.parameters() if (p.ndim > 1) is matrix] for matrix in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=RATE)
    for step in range(steps):
        inputs, targets = batch_of(step)
        loss = F.mse_loss(module(inputs), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(job: str) -> None:
    """Train under one plan, go on under others, and tell the losses beside those of a plain loop."""
    with report_progress() as progress:
        dist.init_process_group("gloo")
        losses = []
        for slug, steps in json.loads(Path(job).read_text())["plans"]:
            progress.update(plan=slug)
            losses += train(slug, steps, str(Path(job).parent / "checkpoints"))
        if dist.get_rank() == 0:
            send_message({"losses": losses, "plain": plain_loop(steps)})
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])

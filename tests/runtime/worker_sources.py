"""Started by test_model_sources on two ranks: Hugging Face's classes, and an encoder, against one process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from gradient_checks import worst_gradient
from test_model_sources import BATCH, ENCODER, ENCODER_PLANS, PLANS, SEQ, text
from torch import nn

import autopar
from autopar.model.huggingface import load_config
from autopar.plan import parse_slug
from autopar.runtime.launch.progress import report_progress, send_message
from autopar.runtime.launch.worker import joined
from autopar.runtime.models.module import build_module, objective_of
from autopar.runtime.models.objective import Objective

TOLERANCE = 2e-5


def check(make: Callable[[], nn.Module], objective: Objective, slug: str) -> None:
    """Loss and gradients of one step."""
    plan, rows = parse_slug(slug), objective.rows(text)
    plain = make()
    inputs, targets = objective.split(torch.from_numpy(rows(0, BATCH)))
    expected = objective.loss(plain(inputs), targets)
    expected.backward()
    size = BATCH // plan.layout.dp
    model = autopar.parallelize(
        make(), plan, loss_fn=objective.loss, num_microbatches=size // plan.microbatch_size, device="cpu"
    )
    share = torch.from_numpy(rows(plan.layout.data_share(dist.get_rank()) * size, size))
    loss = model.train_step(*objective.split(share)).clone()
    dist.all_reduce(loss, dist.ReduceOp.AVG)
    torch.testing.assert_close(loss, expected.detach())
    worst = worst_gradient(model, {name: p.grad for name, p in plain.named_parameters() if p.grad is not None})
    assert worst < TOLERANCE, f"{slug}: {worst}"


def main() -> None:
    """All checks."""
    folder = Path(json.loads(Path(sys.argv[1]).read_text())["folder"])
    with report_progress() as progress, joined("cpu"):
        makers = []
        for kind, slugs in PLANS.items():
            path = folder / kind / "config.json"
            spec = load_config(path)
            makers += [(kind, spec, str(path), slug) for slug in slugs]
        makers += [("encoder", ENCODER, "", slug) for slug in ENCODER_PLANS]
        for name, spec, source, slug in makers:
            progress.update(plan=f"{name} {slug}")
            check(lambda: build_module(spec, source, 3), objective_of(spec, seq_len=SEQ), slug)  # noqa: B023
            if dist.get_rank() == 0:
                send_message({"checked": f"{name} {slug}"})


if __name__ == "__main__":
    main()

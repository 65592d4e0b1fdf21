"""What the executor costs over the plainest script of the same layout: ``python benchmarks/overhead.py [--rounds N]``.

Two ranks on this machine hold the same model twice, once in a hand-written training loop of a dozen lines (DDP, or
``fully_shard`` of each block), once in autopar's trainer with its progress, loss and log. Steps of both are taken in
turn, in one run and on the same batches, so that whatever else the machine does hits both. Printed: medians, and the
median of the ratios of neighbouring steps with the quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LAYOUTS = ("dp2.mb4", "dp2.z3.mb4", "dp2.z2.mb4", "dp2.mb1")
RANKS = 2


def plain_step(slug: str, device: object) -> Callable[[object, object], object]:
    """The training step that somebody would write by hand with torch alone."""
    import torch
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from autopar.model.presets import load_preset
    from autopar.model.transformer import build, language_model_loss
    from autopar.plan import parse_slug

    plan = parse_slug(slug)
    model: torch.nn.Module = build(load_preset("demo-gpt"))
    if plan.zero_stage:
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, reshard_after_forward=plan.zero_stage == 3)  # type: ignore[arg-type]
        fully_shard(model, reshard_after_forward=plan.zero_stage == 3)
    else:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        parts = list(zip(inputs.split(plan.microbatch_size), targets.split(plan.microbatch_size), strict=True))
        total = torch.zeros(())
        for index, (x, y) in enumerate(parts):
            last = index == len(parts) - 1
            if plan.zero_stage:
                model.set_requires_gradient_sync(last)  # type: ignore[operator]
                loss = language_model_loss(model(x), y) / len(parts)
                loss.backward()
            elif last:
                loss = language_model_loss(model(x), y) / len(parts)
                loss.backward()
            else:
                with model.no_sync():  # type: ignore[operator]
                    loss = language_model_loss(model(x), y) / len(parts)
                    loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step  # type: ignore[return-value]

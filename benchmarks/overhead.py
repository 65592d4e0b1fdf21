"""What the executor costs over the plainest script of the same layout: ``python benchmarks/overhead.py [--rounds N]``.

Two ranks on this machine hold the same model twice, once in a hand-written training loop (DDP, or ``fully_shard`` of
each block), once in the loop behind ``autopar run`` with all that it does: data, progress, clipping, log, metrics.
Steps of both are taken in turn in one run, so that whatever else the machine does hits both. The time of autopar's step
is that from the end of one plain step to the beginning of the next. Both clip by the global norm. Printed: medians, and
the median of the ratios of neighbouring steps with their quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAYOUTS = ("dp2.mb4", "dp2.mb1", "dp2.z2.mb4", "dp2.z3.mb4")
RANKS, BATCH, SEQ, CLIP, SKIPPED = 2, 16, 128, 1.0, 6


def plain_step(slug: str) -> Callable[[Any, Any], None]:
    """The training step that somebody would write by hand with torch alone."""
    import torch
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from autopar.model.presets import load_preset
    from autopar.model.transformer import build, language_model_loss
    from autopar.plan import parse_slug

    plan = parse_slug(slug)
    model: Any = build(load_preset("demo-gpt"))
    if plan.zero_stage:
        for block in model.blocks:
            fully_shard(block, reshard_after_forward=plan.zero_stage == 3)
        fully_shard(model, reshard_after_forward=plan.zero_stage == 3)
    else:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def backward(x: Any, y: Any, parts: int) -> None:
        (language_model_loss(model(x), y) / parts).backward()

    def step(inputs: Any, targets: Any) -> None:
        parts = list(zip(inputs.split(plan.microbatch_size), targets.split(plan.microbatch_size), strict=True))
        for index, (x, y) in enumerate(parts):
            last = index == len(parts) - 1
            if plan.zero_stage:
                model.set_requires_gradient_sync(last)
                model.set_reshard_after_backward(last or plan.zero_stage == 3)
            if plan.zero_stage or last:
                backward(x, y, len(parts))
            else:
                with model.no_sync():
                    backward(x, y, len(parts))
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def worker(path: str) -> None:
    """One rank: autopar's training loop, with a plain step before each of its steps."""
    import torch
    import torch.distributed as dist

    from autopar.runtime.job import read_job
    from autopar.runtime.progress import Progress
    from autopar.runtime.training import train
    from autopar.runtime.worker import joined

    job = read_job(path)
    [plan] = job.plans
    pairs: list[tuple[float, float]] = []

    class Alternating(Progress):
        """Takes a plain step wherever the loop says that a step begins."""

        loop_begun = by_hand_s = 0.0

        def update(self, *, plan: str | None = None, step: int | None = None, doing: str = "") -> None:
            super().update(plan=plan, step=step, doing=doing)
            if doing != "begins":
                return
            begun = time.perf_counter()
            if self.loop_begun:
                pairs.append((self.by_hand_s, begun - self.loop_begun))
            dist.barrier()
            begun = time.perf_counter()
            by_hand(tokens[:, :-1], tokens[:, 1:])
            self.by_hand_s = time.perf_counter() - begun
            dist.barrier()
            self.loop_begun = time.perf_counter()

    with joined("cpu") as device:
        by_hand = plain_step(plan.slug)
        tokens = torch.randint(0, 256, (BATCH // RANKS, SEQ + 1))
        train(job, job.training, device, Alternating(dist.get_rank(), None))  # type: ignore[arg-type]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, pairs)
        if dist.get_rank() == 0:
            slowest = [tuple(map(max, zip(*both, strict=True))) for both in zip(*everyone, strict=True)]
            Path(job.out_dir, "pairs.json").write_text(json.dumps(slowest))


def compare(slug: str, steps: int, folder: Path) -> None:
    """Run one layout and print a line."""
    from autopar.model.presets import load_preset
    from autopar.plan import parse_slug
    from autopar.runtime.job import Saving, Training, TrainJob, write_job
    from autopar.runtime.launch import launch
    from autopar.runtime.nodes import Node
    from autopar.workload import Precision, Workload

    job = TrainJob(
        model=load_preset("demo-gpt"), workload=Workload(global_batch=BATCH, seq_len=SEQ, precision=Precision.FP32),
        plans=(parse_slug(slug),), steps=steps, clip=CLIP, out_dir=str(folder),
        training=Training(saving=Saving(at_end=False), self_check=False),
    )  # fmt: skip
    write_job(folder / "job.json", job)
    node = Node(index=0, address="127.0.0.1", env={"PYTHONPATH": f"{Path(__file__).parent}:{Path.cwd()}"})
    launch("overhead", folder / "job.json", nodes=[node], ranks_per_node=RANKS, out_dir=folder, stall_timeout_s=120)
    pairs = json.loads((folder / "pairs.json").read_text())[SKIPPED:]
    ratios = sorted(ours / plain for plain, ours in pairs)
    low, middle, high = statistics.quantiles(ratios, n=4)
    plain, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"{slug:12} plain {1e3 * plain:7.1f} ms, autopar {1e3 * ours:7.1f} ms; ratio of neighbours {middle:.3f} "
        f"({low:.3f} to {high:.3f}), of medians {ours / plain:.3f}, of least {_least(pairs):.3f}; {len(pairs)} pairs",
        flush=True,
    )


def _least(pairs: list[tuple[float, float]]) -> float:
    plain, ours = (min(column) for column in zip(*pairs, strict=True))
    return ours / plain


def main() -> None:
    """Compare every layout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--layouts", nargs="*", default=LAYOUTS)
    options = parser.parse_args()
    for slug in options.layouts:
        with tempfile.TemporaryDirectory() as folder:
            compare(slug, options.steps, Path(folder))


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].endswith("job.json"):
        worker(sys.argv[1])
    else:
        main()

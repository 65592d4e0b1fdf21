"""What the executor costs over the plainest script of the same layout: ``python benchmarks/overhead.py [-o FOLDER]``.

Two ranks on this machine hold the same model twice, once in a hand-written training loop (DDP, or ``fully_shard`` of
each block), once in the loop behind ``autopar run`` with all that it does: data, progress, clipping, log, metrics.
Steps of both are taken in turn in one run, so that whatever else the machine does hits both. The time of autopar's step
is that from the end of one plain step to the beginning of the next. Both clip by the global norm. Printed, and with
``-o`` written as README.md and pairs.csv: medians, and the median of the ratios of neighbouring steps with an interval
that holds it in 95 of 100 runs (order statistics, no assumption on the noise).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scipy.stats import binom

LAYOUTS = ("dp2.mb4", "dp2.mb1", "dp2.z2.mb4", "dp2.z3.mb4")
RANKS, BATCH, SEQ, CLIP, SKIPPED = 2, 16, 128, 1.0, 6
COLUMNS = ("plan", "pairs", "plain ms", "autopar ms", "ratio", "interval")


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
    from autopar.runtime.launch.progress import Progress
    from autopar.runtime.launch.worker import joined
    from autopar.runtime.train.training import train

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


def compare(slug: str, steps: int, folder: Path) -> list[tuple[float, float]]:
    """Run one layout; seconds of a plain step and of autopar's beside it, the first ones left out."""
    from autopar.model.presets import load_preset
    from autopar.plan import parse_slug
    from autopar.runtime.job import Saving, Training, TrainJob, write_job
    from autopar.runtime.launch.launcher import launch
    from autopar.runtime.launch.nodes import Node
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
    return [(plain, ours) for plain, ours in pairs]


def summary(slug: str, pairs: Sequence[tuple[float, float]]) -> tuple[str, ...]:
    """One layout's row: plan, pairs, median ms of both, median ratio with its interval."""
    ratios = sorted(ours / plain for plain, ours in pairs)
    low, high = (ratios[min(int(place), len(ratios) - 1)] for place in binom.ppf((0.025, 0.975), len(ratios), 0.5))
    plain, ours = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    return (
        slug, str(len(pairs)), f"{plain:.0f}", f"{ours:.0f}",
        f"{statistics.median(ratios):.3f}", f"{low:.3f} to {high:.3f}",
    )  # fmt: skip


def write_report(out: Path, found: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """README.md and pairs.csv of all layouts so far."""
    import torch

    from autopar.runtime.launch.worker import device_name

    out.mkdir(parents=True, exist_ok=True)
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(summary(slug, pairs) for slug, pairs in found.items())]
    ratios = [ours / plain for pairs in found.values() for plain, ours in pairs]
    machine = f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores, torch {torch.__version__}"
    text = (
        f"# Overhead of the executor\n\nSteps of a hand-written loop (DDP or `fully_shard` of each block, AdamW, "
        f"clipping) and of the loop behind `autopar run`, taken in turn by {RANKS} processes in one run: demo-gpt, "
        f"global batch {BATCH}, {SEQ} tokens, fp32. Over all {len(ratios)} pairs the median ratio is "
        f"{statistics.median(ratios):.3f}.\n\nMade by `python benchmarks/overhead.py -o {out}` on "
        f"{datetime.now(UTC).date()}: {machine}. The interval holds the true median ratio in 95 of 100 runs.\n\n"
    )
    text += "".join(f"| {' | '.join(row)} |\n" for row in rows)
    (out / "README.md").write_text(text, encoding="utf-8")
    with (out / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("plan", "plain_s", "autopar_s"))
        writer.writerows((slug, f"{a:.4f}", f"{b:.4f}") for slug, pairs in found.items() for a, b in pairs)


def main() -> None:
    """Compare every layout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--layouts", nargs="*", default=LAYOUTS)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    found = {}
    print(*COLUMNS, sep="  ")
    for slug in options.layouts:
        with tempfile.TemporaryDirectory() as folder:
            found[slug] = compare(slug, options.steps, Path(folder))
        print(*summary(slug, found[slug]), sep="  ", flush=True)
        if options.out:
            write_report(options.out, found)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].endswith("job.json"):
        worker(sys.argv[1])
    else:
        main()

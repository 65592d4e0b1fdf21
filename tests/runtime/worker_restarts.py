"""Started by test_restarts: ranks that add up numbers, keep the sum, and are struck once by each fault of the job."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from autopar.runtime.launch.progress import Progress, report_progress, send_message
from autopar.runtime.launch.watchdog import guard

Sum = Callable[[int, int], float]


def strike(folder: Path, rank: int, step: int, faults: list[tuple[int, int, str]]) -> None:
    """Do to this process what the job has for it at this step, unless it was done before."""
    for index, (struck, when, what) in enumerate(faults):
        mark = folder / f"done{index}"
        if (struck, when) == (rank, step) and not mark.exists():
            mark.touch()
            if what == "raise":
                raise ValueError("bad luck")
            os.kill(os.getpid(), signal.Signals[what])


def sum_by_files(folder: Path) -> Sum:
    """Adds up the ranks' terms of a step through files, so that ranks wait for each other without torch."""
    world_size = int(os.environ["WORLD_SIZE"])

    def total(step: int, term: int) -> float:
        (folder / f"term{step}.{os.environ['RANK']}").write_text(str(term))
        files = [folder / f"term{step}.{rank}" for rank in range(world_size)]
        while not all(file.exists() and file.read_text() for file in files):
            time.sleep(0.02)
        return float(sum(int(file.read_text()) for file in files))

    return total


def sum_by_collective() -> Sum:
    """Adds them up by an all-reduce."""
    import torch
    import torch.distributed as dist

    def total(step: int, term: int) -> float:
        value = torch.tensor([float(term)])
        dist.all_reduce(value)
        return value.item()

    return total


def train(progress: Progress, folder: Path, job: dict, total: Sum) -> None:
    """``values`` grow by the sum of all ranks' terms; rank 0 keeps them after every step."""
    rank, kept = int(os.environ["RANK"]), folder / "kept.json"
    state = json.loads(kept.read_text()) if kept.exists() else {"step": 0, "values": []}
    values: list[float] = state["values"]
    if rank == 0:
        send_message({"resumed": state["step"]})
    for step in range(state["step"], job["steps"]):
        progress.update(plan="p", step=step)
        strike(folder, rank, step, job["faults"])
        values.append((values[-1] if values else 0.0) + total(step, rank + step))
        if rank == 0:
            whole = kept.with_suffix(".new")
            whole.write_text(json.dumps({"step": step + 1, "values": values}))
            whole.replace(kept)


def main() -> None:
    """Run the job in the file that is the only argument."""
    folder, job = Path(sys.argv[1]).parent, json.loads(Path(sys.argv[1]).read_text())
    with ExitStack() as stack:
        progress = stack.enter_context(report_progress())
        guard(progress, timeout_s=job["timeout_s"], folder=folder / "ranks")
        if job["torch"]:
            from autopar.runtime.launch.worker import joined

            stack.enter_context(joined("cpu", job["timeout_s"]))
        train(progress, folder, job, sum_by_collective() if job["torch"] else sum_by_files(folder))


if __name__ == "__main__":
    main()

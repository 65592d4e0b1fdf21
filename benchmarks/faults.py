"""Ranks killed and stopped at random steps of real training: ``python benchmarks/faults.py -o reports/faults``.

Each run trains a small GPT under one plan to the end although its ranks are struck one after another by SIGKILL or
SIGSTOP at random steps, and must leave the losses of a run that nothing struck. Ranks and steps follow from the seed;
the very action within a step does not, since the signals come from outside. Writes faults.csv, runs.csv and README.md.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from autopar.model.spec import ModelSpec
from autopar.plan import Plan, parse_slug
from autopar.runtime.job import Logging, Saving, Training, TrainJob
from autopar.runtime.launch.nodes import local_node
from autopar.runtime.launch.progress import RUNNING, Status, read_statuses
from autopar.runtime.run import run_training
from autopar.runtime.train.metrics import METRICS
from autopar.workload import Precision, Workload

RUNS = (
    ("dp2.z0.mb2", 5), ("dp3.z2.mb2", 4), ("pp2.dp2.z0.mb1", 4), ("dp4.z3.mb1", 4), ("pp2.mb2", 3),
)  # fmt: skip
"""Plans of 2 to 4 ranks, and how many times each is struck."""
STEPS, SAVE_EVERY = 60, 4
HANG_EVERY = 3
POLL_S = 0.02


@dataclass(kw_only=True, slots=True)
class Strike:
    """A signal to a rank.

    Attributes:
        rank, step, kind: whom, at which step at the earliest, SIGKILL or SIGSTOP.
        struck_at: the step that the rank was really at.
        told: what the user was told.
        resumes_from: the checkpoint that the run went on from.
        lost_s: seconds until the run had come as far again.
    """

    rank: int
    step: int
    kind: str
    struck_at: int = -1
    told: str = ""
    resumes_from: str = ""
    lost_s: float = 0.0


@dataclass(kw_only=True, slots=True)
class Striker:
    """Strikes the ranks of a run as its status files tell that they are where they should be struck."""

    folder: Path
    ranks: int
    strikes: Sequence[Strike]
    ended: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Strike one after another, each when the run has recovered from the one before."""
        for strike in self.strikes:
            status = self._wait(strike.rank, strike.step, pid=None)
            if status is None:
                return
            os.kill(status.pid, signal.Signals[strike.kind])
            began, strike.struck_at = time.monotonic(), status.step
            if self._wait(strike.rank, status.step, pid=status.pid) is None:
                return
            strike.lost_s = time.monotonic() - began

    def _wait(self, rank: int, step: int, pid: int | None) -> Status | None:
        """The status of a rank that runs and has come to a step, in another process than ``pid``; None at the end."""
        while not self.ended.wait(POLL_S):
            try:
                status = read_statuses(self.folder, self.ranks).get(rank)
            except OSError:
                continue
            if status and status.state == RUNNING and status.pid != pid and status.step >= step and status.doing:
                return status
        return None


def draw(rng: random.Random, ranks: int, number: int, first: int) -> list[Strike]:
    """Strikes at random steps, one in each of ``number`` equal parts of the run; every third one is a hang."""
    part = (STEPS - 2) // number
    return [
        Strike(
            rank=rng.randrange(ranks),
            step=1 + i * part + rng.randrange(max(1, part * 2 // 3)),
            kind="SIGSTOP" if (first + i) % HANG_EVERY == HANG_EVERY - 1 else "SIGKILL",
        )
        for i in range(number)
    ]


def model() -> ModelSpec:
    """A GPT of 50 thousand parameters."""
    return ModelSpec(
        name="tiny-gpt", num_layers=4, hidden_size=32, num_heads=4, num_kv_heads=4, ffn_size=64, vocab_size=256,
        max_seq_len=32, fused_qkv=False,
    )  # fmt: skip


def job(plan: Plan, out: Path) -> TrainJob:
    """Training with a checkpoint every few steps."""
    return TrainJob(
        model=model(), workload=Workload(global_batch=12, seq_len=32, precision=Precision.FP32), plans=(plan,),
        steps=STEPS, out_dir=str(out),
        training=Training(
            saving=Saving(every_steps=SAVE_EVERY), logging=Logging(every=1), self_check=False
        ),
    )  # fmt: skip


def losses(folder: Path) -> list[tuple[str, str, str]]:
    """Step, loss and gradient norm as the run wrote them down."""
    with (folder / METRICS).open(newline="", encoding="utf-8") as stream:
        return [(row["step"], row["loss"], row["grad_norm"]) for row in csv.DictReader(stream)]


def train(plan: Plan, out: Path, strikes: Sequence[Strike], timeout_s: float) -> list[tuple[str, str, str]]:
    """Train to the end under strikes; fills them in and returns the losses of all steps."""
    told: list[dict[str, Any]] = []

    def note(message: dict[str, Any]) -> None:
        if message.get("event") == "restart":
            told.append(message)

    ranks = plan.layout.world_size
    striker = Striker(folder=out, ranks=ranks, strikes=strikes)
    thread = threading.Thread(target=striker.run, daemon=True)
    thread.start()
    try:
        run_training(
            job(plan, out), nodes=(local_node(),), ranks_per_node=ranks, stall_timeout_s=timeout_s,
            max_restarts=len(strikes), on_message=note,
        )  # fmt: skip
    finally:
        striker.ended.set()
        thread.join()
    for strike, message in zip(strikes, told, strict=False):
        strike.told, strike.resumes_from = message["what"], message["resumes_from"]
    return losses(out)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([columns, *rows])


def main() -> None:
    """Strike all runs and write down what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path, default=Path("reports/faults"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds without progress that are a hang")
    parser.add_argument("--run", type=int, help="only this one of the runs, counted from 0")
    options = parser.parse_args()
    rng, faults, runs, first = random.Random(options.seed), [], [], 0
    with tempfile.TemporaryDirectory(prefix="autopar-faults-") as name:
        for slug, number in RUNS if options.run is None else RUNS[options.run : options.run + 1]:
            plan = parse_slug(slug)
            undisturbed = train(plan, Path(name) / f"{slug}-alone", (), options.timeout)
            strikes = draw(rng, plan.layout.world_size, number, first)
            first += number
            began = time.monotonic()
            struck = train(plan, Path(name) / slug, strikes, options.timeout)
            runs.append((slug, plan.layout.world_size, number, len(struck), struck == undisturbed,
                         f"{time.monotonic() - began:.0f}"))  # fmt: skip
            faults += [(slug, s.kind, s.rank, s.struck_at, s.resumes_from, f"{s.lost_s:.1f}", s.told) for s in strikes]
            print(*runs[-1], flush=True)
            shutil.rmtree(Path(name) / slug)
            write_report(options.out, options.seed, options.timeout, faults, runs)


def write_report(
    out: Path, seed: int, timeout_s: float, faults: Sequence[Sequence[Any]], runs: Sequence[Sequence[Any]]
) -> None:
    """The files, anew after each run."""
    out.mkdir(parents=True, exist_ok=True)
    columns = ("plan", "signal", "rank", "struck_at_step", "resumes_from", "lost_s", "told")
    write_csv(out / "faults.csv", columns, faults)
    write_csv(out / "runs.csv", ("plan", "ranks", "faults", "steps", "same_losses", "seconds"), runs)
    (out / "README.md").write_text(readme(seed, timeout_s, faults, runs), encoding="utf-8")


def readme(seed: int, timeout_s: float, faults: Sequence[Sequence[Any]], runs: Sequence[Sequence[Any]]) -> str:
    """What happened, in words and two tables."""
    kills = sum(fault[1] == "SIGKILL" for fault in faults)
    lost = {kind: sorted(float(f[5]) for f in faults if f[1] == kind) for kind in ("SIGKILL", "SIGSTOP")}
    same = sum(bool(run[4]) for run in runs)
    lines = [
        "# Faults", "",
        f"Kills: {kills}; hangs: {len(faults) - kills}; at random steps and ranks of {len(runs)} training runs. "
        f"{same} of {len(runs)} ended with the losses of the same run without faults, to the "
        "last digit written (8).", "",
        f"Made by `python benchmarks/faults.py --seed {seed} --timeout {timeout_s:g}` on "
        f"{datetime.now(UTC).date()}, {platform.machine()}, {os.cpu_count()} cores shared with other work. "
        f"A tiny GPT, {STEPS} steps, a checkpoint every {SAVE_EVERY} steps. Lost is the time from the signal until the "
        "struck rank had come as far again: noticing it (for a hang the timeout without progress), ending all ranks, "
        "starting Python and torch anew, which is most of it, and the steps since the checkpoint. Median "
        + ", ".join(f"{values[len(values) // 2]:.0f} s after a {kind}" for kind, values in lost.items() if values)
        + ".", "",
        *table(("plan", "ranks", "faults", "steps", "same losses", "seconds"), runs), "",
        *table(("plan", "signal", "rank", "at step", "resumed from", "lost s", "what the user was told"), faults), "",
    ]  # fmt: skip
    return "\n".join(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    main()

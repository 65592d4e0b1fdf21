"""Ranks that are killed, fail or hang are started again and go on where they were; a fault that stays is told once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from autopar.errors import RunError
from autopar.runtime.launch.diagnosis import Fault
from autopar.runtime.launch.launcher import launch, why_final
from autopar.runtime.launch.nodes import Node
from autopar.runtime.launch.progress import DONE, MESSAGES_VARIABLE, RUNNING, Progress, Status, read_statuses
from autopar.runtime.launch.rendezvous import agree
from autopar.runtime.launch.watchdog import stall_message
from costmodels.records import write_json

STEPS, TIMEOUT_S = 12, 8.0
Faults = list[tuple[int, int, str]]


def expected(ranks: int) -> list[float]:
    """What an undisturbed run keeps."""
    terms = [sum(rank + step for rank in range(ranks)) for step in range(STEPS)]
    return [float(sum(terms[: step + 1])) for step in range(STEPS)]


def write_job(folder: Path, faults: Faults, *, torch: bool) -> Path:
    job = folder / "job.json"
    job.write_text(json.dumps({"steps": STEPS, "timeout_s": TIMEOUT_S, "faults": faults, "torch": torch}))
    return job


def kept(folder: Path) -> list[float]:
    return list(json.loads((folder / "kept.json").read_text())["values"])


def run(folder: Path, faults: Faults, *, ranks: int, max_restarts: int) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    node = Node(index=0, address="127.0.0.1", env={"PYTHONPATH": str(Path(__file__).parent)})
    launch(
        "worker_restarts", write_job(folder, faults, torch=False), nodes=[node], ranks_per_node=ranks,
        out_dir=folder / "logs", stall_timeout_s=TIMEOUT_S, max_restarts=max_restarts, on_message=messages.append,
    )  # fmt: skip
    return messages


@pytest.mark.dist
@pytest.mark.timeout(900)
def test_killed_failed_and_hung_ranks_are_started_again(tmp_path: Path) -> None:
    faults: Faults = [(1, 3, "SIGKILL"), (0, 5, "raise"), (2, 8, "SIGSTOP")]
    messages = run(tmp_path, faults, ranks=3, max_restarts=3)
    assert kept(tmp_path) == expected(3)
    assert [m["resumed"] for m in messages if "resumed" in m] == [0, 3, 5, 8]
    told = [m for m in messages if m.get("event") == "restart"]
    assert [(m["rank"], m["restart"], m["of"]) for m in told] == [(1, 1, 3), (0, 2, 3), (2, 3, 3)]
    for message, what in zip(
        told, ("killed by SIGKILL", "failed at plan p, step 5: ValueError", "is stopped"), strict=True
    ):
        assert what in message["what"] and "\n" not in message["what"]
    assert "bad luck" in (tmp_path / "logs" / "attempt1" / "rank0.err").read_text(), "logs of each start are kept"
    assert {status.state for status in read_statuses(tmp_path / "logs", 3).values()} == {DONE}


@pytest.mark.dist
@pytest.mark.timeout(900)
def test_plain_torchrun_starts_again(tmp_path: Path) -> None:
    """Without a launcher: a rank that hangs is named by the others, which end; torchrun starts all again.

    Its store keeps the dead ranks' keys, unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE is set: no need for that here.
    """
    faults: Faults = [(0, 2, "SIGKILL"), (1, 6, "SIGSTOP")]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2",
        "-m", "worker_restarts", str(write_job(tmp_path, faults, torch=True)),
    ]  # fmt: skip
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{Path(__file__).parent}:{Path.cwd()}",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2",
        MESSAGES_VARIABLE: "1",
    }  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert kept(tmp_path) == expected(2)
    assert [line for line in done.stdout.splitlines() if "resumed" in line] == [
        f'@autopar {{"resumed": {step}}}' for step in (0, 2, 6)
    ]
    assert "rank 0 of 2 made no progress for 8 s at plan p, step 6; rank 1 does not respond " in done.stderr


def fault(what: str, error: str = "", begun: bool = True) -> Fault:
    return Fault(what=what, rank=0, error=error, begun=begun)


def test_when_a_restart_is_no_use() -> None:
    killed, wrong = fault("rank 0 was killed at step 3"), fault("rank 0 failed at step 3: E", error="E")
    assert why_final([killed], 0) == ""
    assert why_final([killed], 1) is None and why_final([killed] * 3, 3) is None, "a kill may come twice"
    assert "started again 3 times" in str(why_final([killed] * 4, 3))
    assert why_final([wrong], 3) is None
    assert "same way before" in str(why_final([wrong, killed, wrong], 3))
    assert "would fail in the same way" in str(why_final([fault("failed", error="E", begun=False)], 3))


def test_ranks_agree_despite_keys_of_dead_ones() -> None:
    store = dist.HashStore()
    names: list[str] = []
    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            found = dict(
                zip((3, 0, 2, 1), pool.map(lambda rank: agree(store, rank, 4, 20.0), (3, 0, 2, 1)), strict=True)
            )
        assert len(found) == 4 and len(set(found.values())) == 1
        names.append(found[0])
    assert len(set(names)) == 3, "no two starts have the same"


def test_a_rank_that_does_not_join_is_named() -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=5))
    store.set("autopar/hello/1", "of a dead rank")
    with pytest.raises(RunError, match=r"rank 1 of 2 did not join within 0.1 s"):
        agree(store, 0, 2, 0.1)
    with pytest.raises(RunError, match="rank 0 did not answer in time"):
        agree(store, 1, 2, 0.1)


def write_status(folder: Path, rank: int, *, step: int, count: int, when: float) -> None:
    status = Status(
        rank=rank, state=RUNNING, plan="p", step=step, doing="", count=count, pid=1, time=when
    )  # fmt: skip
    write_json(folder / f"rank{rank}.json", status)


def test_whom_a_stalled_rank_waits_for(tmp_path: Path) -> None:
    progress = Progress(0, None)
    progress.update(plan="p", step=7, doing="2F0")
    own = "rank 0 of 3 made no progress for 60 s at plan p, step 7, 2F0"
    assert stall_message(progress, 60, tmp_path, 3) == own, "its own place where no folder is shared"
    for rank in range(3):
        write_status(tmp_path, rank, step=7, count=20, when=1000.0 + rank)
    assert stall_message(progress, 60, tmp_path, 3) == own, "all got as far, and clocks differ a little"
    write_status(tmp_path, 2, step=6, count=19, when=1000.0)
    assert stall_message(progress, 60, tmp_path, 3) == f"{own}; rank 2 hangs at plan p, step 6"
    write_status(tmp_path, 1, step=7, count=20, when=940.0)
    assert stall_message(progress, 60, tmp_path, 3) == f"{own}; rank 1 does not respond at plan p, step 7"
    (tmp_path / "rank2.json").unlink()
    (tmp_path / "rank1.json").unlink()
    write_status(tmp_path, 1, step=7, count=20, when=1000.0)
    assert stall_message(progress, 60, tmp_path, 3) == f"{own}; rank 2 never reported before its first step"
